"""Prompts with their ground truths: reading, encoding and ordering them."""
