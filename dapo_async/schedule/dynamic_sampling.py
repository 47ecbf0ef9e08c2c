"""Dynamic sampling: which groups teach nothing, and are dropped so that groups that do can take their places.

Decided by verdict, never by the shaped reward: an all-wrong group with one overlong member has spread in its rewards,
yet nothing in it deserves to be reinforced. Source: DAPO, arXiv:2503.14476, Eq. 11: 0 < number of right answers < G.
"""

from collections.abc import Sequence
from typing import Literal


def filter_reason(correct: Sequence[bool]) -> Literal["filtered_all_right", "filtered_all_wrong"] | None:
    """Why a group with these verdicts is dropped; None: it holds right and wrong answers, and is kept.

    Raises ``ValueError`` for a group without any.
    """
    if not correct:
        raise ValueError("a group without verdicts can neither be kept nor dropped")
    if all(correct):
        return "filtered_all_right"
    return None if any(correct) else "filtered_all_wrong"
