"""Whether each truth of the data is right for itself: where it is not, no answer to its prompt can be.

Asked of built-in verifiers only; what a user's function calls an answer is its own business.
"""

import logging
import re
import time
from collections.abc import Mapping, Sequence

import msgspec

from dapo_async.config.settings import Reward
from dapo_async.data.prompts import Prompt
from dapo_async.errors import ConfigError
from dapo_async.verify.verifier import make_verifier

READ_AS_MATHEMATICS = frozenset({"sums", "dapo_math", "math_verify"})  # a list of one truth is that truth
# An answer that is the truth, as each verifier wants it. Line ends are the file's, not the answer's.
ANSWERS = {"sums": "#{}", "exact": "{}", "dapo_math": "Answer: {}", "math_verify": "Answer: {}"}
MAX_TRUTHS = {"math_verify": 1000}  # spread evenly over the file; it takes some milliseconds for each
LIMIT_S = 60.0  # for one file; what has no verdict by then is not counted
TOLD = 3
TOLD_CHARS = 80

logger = logging.getLogger(__name__)


def check_truths(reward: Reward, files: Mapping[str, Sequence[Prompt]]) -> None:
    """Warn of each file with truths that are not right for themselves. Raises ``ConfigError`` if in one all are not."""
    if reward.verifier not in ANSWERS:
        return
    for path, prompts in files.items():
        most = MAX_TRUTHS.get(reward.verifier, len(prompts))
        tried = prompts[:: -(-len(prompts) // most)] if prompts else []
        verdicts = judge_truths(reward, [prompt.truth for prompt in tried])
        wrong = [tried[number] for number, right in sorted(verdicts.items()) if not right]
        if not wrong:
            continue
        sample = f" tried of {len(prompts)}" if len(verdicts) < len(prompts) else ""
        examples = ", ".join(f"{prompt.truth[:TOLD_CHARS]!r} (prompt {prompt.id})" for prompt in wrong[:TOLD])
        message = (
            f"{path}: {len(wrong)} of {len(verdicts)} truths{sample} are not right for themselves under "
            f'reward.verifier = "{reward.verifier}", so that no answer to their prompts can be: {examples}'
        )
        if len(wrong) == len(verdicts):
            raise ConfigError(message)
        logger.warning("%s", message)


def judge_truths(reward: Reward, truths: Sequence[str]) -> dict[int, bool]:
    """Whether each truth is right for itself, by its place; those without a verdict in time are absent."""
    verifier = make_verifier(msgspec.structs.replace(reward, compare_with=""))
    found: dict[int, bool] = {}
    try:
        for number, truth in enumerate(truths):
            answer = truth if reward.verifier == "exact" else re.sub(r"\s+", " ", truth).strip()
            verifier.submit(number, ANSWERS[reward.verifier].format(answer), truth)
        deadline = time.monotonic() + LIMIT_S
        while verifier.pending and time.monotonic() < deadline:
            for key, verdict in verifier.poll(timeout_s=1.0):
                assert isinstance(key, int)  # as submitted
                if verdict.status == "ok":  # an error or a timeout says nothing of the truth
                    found[key] = verdict.correct
    finally:
        verifier.close()
    return found
