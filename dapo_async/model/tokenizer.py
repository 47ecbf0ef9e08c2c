"""The tokenizer of a model, for learner and workers: loading it, and answers back to text.

Not owned: prompts to tokens (``prompts``), and where an answer ends (``checks``).
"""

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dapo_async.data.prompts import known_tokens
from dapo_async.errors import ConfigError
from dapo_async.model.loading import load_part


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer at ``path``, a folder or hub id. Raises ``ConfigError`` if there is none."""
    tokenizer: PreTrainedTokenizerBase = load_part(
        "tokenizer", path, AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code
    )
    # Where no file holds a vocabulary, transformers makes a tokenizer of the special tokens that it knows by itself.
    if not set(tokenizer.get_vocab()) - {str(token) for token in tokenizer.added_tokens_decoder.values()}:
        raise ConfigError(
            f'model.path = "{path}" holds no tokenizer: no file of it has a vocabulary (tokenizer.json, vocab.json, '
            "tokenizer.model or the like); copy the files of the model that it was made from"
        )
    return tokenizer


class TextDecoder:
    """Completions to the text that is judged: special tokens left out, and those that the tokenizer does not know.

    A model whose vocabulary is padded beyond its tokenizer's can sample the latter; not every tokenizer decodes them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._known = tokenizer, known_tokens(tokenizer)

    def __call__(self, ids: np.ndarray) -> str:
        """The text of ``ids``, int32 [tokens]."""
        return str(self._tokenizer.decode(ids[ids < self._known], skip_special_tokens=True))
