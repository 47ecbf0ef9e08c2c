"""The loop: draw a batch, train on it, publish the new weights, write down what happened."""
