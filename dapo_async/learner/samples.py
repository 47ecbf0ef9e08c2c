"""Readable samples of a trained batch: to ``samples.jsonl``, and as texts to TensorBoard."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from dapo_async.config.settings import Logging
from dapo_async.data.prompts import known_tokens
from dapo_async.learner.update import TrainResult
from dapo_async.observe.records import Sample
from dapo_async.observe.run_folder import RunFolder


class SampleWriter:
    """Writes the first completions of each batch's first groups."""

    def __init__(self, folder: RunFolder, tokenizer: PreTrainedTokenizerBase, settings: Logging) -> None:
        self._folder, self._tokenizer, self._settings = folder, tokenizer, settings
        self.known = known_tokens(tokenizer)  # token ids from here on are of a padded vocabulary

    def write(self, result: TrainResult, step: int) -> None:
        """Write the samples of the batch trained in ``step``."""
        samples = list(self._samples(result, step))
        for sample in samples:
            self._folder.samples.write(sample)
        if self._settings.text_every and step % self._settings.text_every == 0 and samples:
            text = "\n\n***\n\n".join(sample.markdown() for sample in samples)
            self._folder.metrics.text("samples", text, step)

    def _samples(self, result: TrainResult, step: int) -> Iterator[Sample]:
        for rollout, rewards, advantages in result.groups[: self._settings.samples_per_batch]:
            completion = rollout.group.completions[0]
            ids = rollout.group.token_ids[: completion.num_tokens]
            yield Sample(
                step=step,
                worker=rollout.worker,
                lease=rollout.lease,
                prompt=rollout.prompt.text,
                answer=str(self._tokenizer.decode(ids[ids < self.known])),
                truth=rollout.prompt.truth,
                predicted=completion.predicted,
                correct=completion.correct,
                reward=float(rewards[0]),
                advantage=float(advantages[0]),
                num_tokens=completion.num_tokens,
                spans=completion.spans,
                finish=completion.finish,
                second=completion.second,
            )
