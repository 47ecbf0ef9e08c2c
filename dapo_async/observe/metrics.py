"""Every number a run may log, declared once: name, unit, meaning.

No other name can be logged, and ``docs/metrics.md`` is generated from this page (``make docs``). A name is
``section/word``, and TensorBoard groups by section. ``*`` at the end of a name stands for words known only at run time.

"The batch" is the batch trained in the step that is logged, "the interval" the time since the step logged
before it, and "in total" means since the start of the run, through resumes.
"""

from typing import NamedTuple


class Metric(NamedTuple):
    """One declared number, or a family of them (``name`` ends in ``_*``)."""

    name: str
    unit: str
    meaning: str  # one sentence, also saying over what it is taken
    section: str


METRICS: dict[str, Metric] = {}
SECTIONS: dict[str, str] = {}  # what each section is about, in one sentence


def _declare(section: str, about: str, *rows: tuple[str, str, str]) -> None:
    """Declare the (word, unit, meaning) of one section. Names are unique by assertion."""
    assert section not in SECTIONS, section
    SECTIONS[section] = about
    for word, unit, meaning in rows:
        name = f"{section}/{word}"
        assert name not in METRICS, name
        METRICS[name] = Metric(name, unit, meaning, section)


_PHASES = {
    "wait_data": "waiting for a full batch",
    "wait_generation": "waiting because too few groups were complete (part of wait_data)",
    "wait_straggler": "waiting for a running lease that this batch must hold to keep the bound (part of wait_data)",
    "wait_publish": "waiting because newer weights had to reach the workers first (part of wait_data)",
    "wait_workers": "waiting while no worker was alive (part of wait_data)",
    "forward_backward": "in forward and backward passes, log-probs at batch start included",
    "optimizer": "clipping gradients and stepping the optimizer",
    "publish": "handing new weights to the publisher",
    "checkpoint": "writing checkpoints",
    "evaluation": "waiting for held-out evaluations",
    "other": "on anything else",
}

_WORKER_PHASES = {
    "decode": "decoding",
    "prefill": "prefilling prompts",
    "verify": "verifying answers",
    "swap": "swapping weights",
    "idle": "with nothing to decode",
    "other": "on anything else",
}

_declare(
    "reward",
    "What the batch's completions earned, as the advantages see it: verdict plus soft overlong punishment.",
    ("mean", "reward", "Mean reward of the batch's completions."),
    ("std", "reward", "Standard deviation of the reward over the batch's completions."),
    ("min", "reward", "Lowest reward of a completion in the batch."),
    ("max", "reward", "Highest reward of a completion in the batch."),
    ("overlong", "reward", "Mean soft overlong punishment alone (0 or negative) of the batch's completions."),
)
_declare(
    "accuracy",
    "Share of right answers, by the verifier alone.",
    ("trained", "share", "Right completions among those of the batch, that is after the filter."),
    ("generated", "share", "Right completions among all that arrived in the interval, filtered groups included."),
)
_declare(
    "length",
    "Completion lengths, stop token included.",
    ("mean", "tokens", "Mean length of the batch's completions."),
    ("min", "tokens", "Shortest completion of the batch."),
    ("max", "tokens", "Longest completion of the batch."),
    ("truncated_share", "share", "Completions of the batch that ended at the length limit."),
    (
        "generated_mean",
        "tokens",
        "Mean length of all completions that arrived in the interval, filtered ones included.",
    ),
    (
        "trained_generated_ratio",
        "ratio",
        "Mean length of all trained completions over that of all accepted ones; 1: no length bias.",
    ),
)
_declare(
    "policy",
    "The objective on the batch: loss, ratios, clipping, distances. Log-probs at the sampling temperature.",
    ("loss", "loss", "The objective that was minimised, over the batch."),
    ("entropy", "nats", "Mean entropy of the policy over the batch's tokens."),
    ("ratio_mean", "ratio", "Mean importance ratio over the batch's tokens."),
    ("ratio_max", "ratio", "Largest importance ratio of a token in the batch."),
    ("clip_low", "share", "Tokens of the batch whose gradient the lower clip bound removed."),
    ("clip_high", "share", "Tokens of the batch whose gradient the upper clip bound removed."),
    ("clip_dual", "share", "Tokens of the batch whose loss the dual clip capped."),
    (
        "kl_behaviour_k1",
        "nats",
        "KL from behaviour policy to policy, mean of -log r over the batch's tokens (k1; may be negative).",
    ),
    ("kl_behaviour_k3", "nats", "The same KL, mean of r - 1 - log r over the batch's tokens (k3; never negative)."),
    (
        "ess_share",
        "share",
        "Effective sample size (sum w)^2 / (n sum w^2) of policy/behaviour over the batch's tokens; 1: on-policy.",
    ),
    ("correction_mean", "ratio", "Mean off-policy correction weight over the batch's tokens; 1 without correction."),
    ("masked_share", "share", "Tokens of the batch whose off-policy correction weight is zero."),
    ("kl_reference", "nats", "KL (k3) to the reference model, mean over the batch's tokens; absent without one."),
)
_declare(
    "mismatch",
    "What arithmetic alone makes of the log-probs: tokens sampled by the very weights they are trained on, before the "
    "first optimizer step; absent in batches without such tokens. Drift is not in it: see policy/kl_behaviour_k3.",
    ("mean", "nats", "Mean absolute difference of the learner's log-probs and those recorded at sampling."),
    ("max", "nats", "Largest such difference."),
    ("k1", "nats", "KL from sampler to learner on these tokens, mean of -log r (may be negative)."),
    ("k3", "nats", "The same KL, mean of r - 1 - log r (never negative)."),
)
_declare(
    "optimizer",
    "What the optimizer made of it.",
    ("grad_norm", "norm", "Gradient norm before clipping, mean over the batch's optimizer steps."),
    ("lr", "lr", "Learning rate of the batch's last optimizer step."),
    ("steps", "steps", "Optimizer steps taken, in total."),
    ("skipped", "steps", "Optimizer steps skipped because loss or gradient norm was not finite, in total."),
)
_declare(
    "staleness",
    "How old the trained data was: learner version minus oldest version in the group.",
    ("mean", "versions", "Mean staleness of the batch's groups."),
    ("min", "versions", "Smallest staleness of a group in the batch."),
    ("max", "versions", "Largest staleness of a group in the batch; at most max_staleness under straggler = wait."),
    ("histogram", "versions", "Distribution of staleness over the batch's groups; a histogram, in TensorBoard only."),
    ("groups_*", "groups", "Groups of the batch that are exactly this stale: the histogram as numbers."),
    ("late", "groups", "Groups trained past the bound (straggler = late), in total."),
    ("mixed_version_share", "share", "Completions of the batch whose tokens come from more than one version."),
)
_declare(
    "publish",
    "How weights reach the workers.",
    ("lag_versions", "versions", "Learner version minus the version that the slowest live worker serves."),
    ("lag_s", "s", "From a version's end of training until all live workers served it, for the newest such version."),
    ("versions", "versions", "Versions published, in total."),
    ("bytes", "bytes", "Size of the newest published weights."),
    ("sent_bytes", "bytes", "Weights sent over the network, whole or as deltas, in total."),
    ("delta_share", "share", "Size of the newest delta over that of the whole set; absent if none was made."),
    ("pushes_full", "pushes", "Whole sets sent, in total."),
    ("pushes_delta", "pushes", "Deltas sent, in total; one may span several versions."),
    ("pushes_shm", "pushes", "Sets given to workers in shared memory, in total."),
    ("unshared", "workers", "Workers that could not open the shared memory offered to them, in total."),
    (
        "buffers_dropped",
        "buffers",
        "Copies of weights that readers held so long that fresh memory was taken, in total.",
    ),
    ("blocked_s", "s", "Time the learner's thread was held up by publishing, waiting for the copy included, in total."),
    ("refused", "pushes", "Weights that workers refused (digest, names or shapes), in total."),
)
_declare(
    "buffer",
    "Complete groups that wait to be trained, counted after the batch was drawn.",
    ("groups", "groups", "Groups in the buffer."),
    ("capacity", "groups", "Most groups the buffer may hold."),
    ("fill", "share", "Groups in the buffer over its capacity."),
    ("tokens", "tokens", "Completion tokens in the buffer."),
)
_declare(
    "groups",
    "The account of all leases: leased = in_flight + buffered + trained + filtered + expired.",
    ("leased", "leases", "Leases issued, in total; one issued again counts once."),
    ("in_flight", "leases", "Leases nobody has answered yet."),
    ("buffered", "groups", "Complete groups not yet trained, a drawn batch included."),
    ("trained", "groups", "Groups trained, in total."),
    ("filtered_all_right", "groups", "Groups dropped because all completions are right, in total."),
    ("filtered_all_wrong", "groups", "Groups dropped because all completions are wrong, in total."),
    ("filtered_share", "share", "Filtered groups among those that arrived in the interval."),
    ("expired", "groups", "Leases and groups given up because they could not meet the staleness bound, in total."),
    ("reissued", "leases", "Leases issued again because their worker was lost or gave them back, in total."),
    ("suspected", "leases", "Of these, leases that a worker which still beats left unanswered for too long, in total."),
)
_declare(
    "drops",
    "Everything that was not accepted, by reason.",
    (
        "duplicates",
        "groups",
        "Groups of a lease that was settled before or is another worker's by now, in total.",
    ),
    (
        "too_old",
        "groups",
        "Groups that came older than their lease allows; they are leased again, in total.",
    ),
    ("refused", "messages", "Messages refused, in total over all reasons."),
    ("prompts_overlong", "prompts", "Training prompts dropped or cut because they exceed data.max_prompt_tokens."),
    ("prompts_duplicate", "prompts", "Training rows left out because an earlier one is exactly equal."),
    ("prompts_without_truth", "prompts", "Training rows left out because their truth is empty."),
    ("prompts_conflicting", "prompts", "Training rows left out because an earlier one has another truth."),
    ("refused_*", "messages", "Messages refused for this reason (malformed, spans, unknown_lease, ...), in total."),
)
_declare(
    "verifier",
    "The verifier's own failures, as which answers count as wrong; and where a second verifier disagrees.",
    ("errors", "answers", "Verifications that raised or crashed, in total."),
    ("timeouts", "answers", "Verifications that exceeded reward.timeout_s, in total."),
    (
        "disagreement",
        "share",
        "Answers that arrived in the interval on which reward.verifier and reward.compare_with differ, among those "
        "both could judge; absent without the latter.",
    ),
    ("first_only", "answers", "Answers right by reward.verifier and wrong by reward.compare_with, in total."),
    ("second_only", "answers", "Answers wrong by reward.verifier and right by reward.compare_with, in total."),
    ("second_errors", "answers", "Verifications by reward.compare_with that raised or crashed, in total."),
    ("second_timeouts", "answers", "Verifications by reward.compare_with that exceeded reward.timeout_s, in total."),
)
_declare(
    "workers",
    "The rollout workers, all of them together.",
    ("alive", "workers", "Workers heard of within network.silence_s."),
    ("lost", "workers", "Workers that fell silent, or whose process ended, in total."),
    (
        "disconnects",
        "connections",
        "Connections that ended since the learner started: a worker left or broke, or was cut off by a message beyond "
        "twice network.max_message_mb.",
    ),
    ("restarts", "restarts", "Worker processes started again after an unexpected end, in total."),
    ("given_up", "workers", "Worker processes that ended once more than workers.max_restarts allows, in total."),
    ("running", "completions", "Completions being decoded."),
    ("busy", "share", "Share of the workers' time in the interval that was not idle."),
)
_declare(
    "worker_time",
    "Where the workers' time of the interval went, as shares over all workers.",
    *((phase, "share", f"Share spent {doing}.") for phase, doing in _WORKER_PHASES.items()),
)
_declare(
    "decode",
    "The workers' decode steps of the interval, all workers together. Of engine torch only: vLLM steps by itself.",
    ("steps", "steps", "Decode steps taken."),
    ("running_mean", "completions", "Completions in a step, mean over the steps."),
    ("step_s", "s", "Time of a step, mean over the steps; prefill left out."),
    ("running_seen", "completions", "Completions in a step, mean over the tokens: what a token sees around it."),
    ("token_s", "s", "Time of a step, mean over the tokens: what a completion waits for its next token."),
)
_declare(
    "time",
    "The learner's time in the interval, by phase. Phases add up to time/step; wait_data has named parts.",
    ("step", "s", "Length of the interval."),
    *((phase, "s", f"Spent {doing}.") for phase, doing in _PHASES.items()),
    ("straggler_waits", "waits", "Batches that were held back for a straggling lease, in total."),
)
_declare(
    "time_share",
    "The same phases as shares of time/step.",
    ("busy", "share", "Share of the interval that the learner computed (forward_backward and optimizer)."),
    *((phase, "share", f"Share spent {doing}.") for phase, doing in _PHASES.items()),
)
_declare(
    "waiting",
    "What came since the last batch, on the lines of a learner that waits for one: about one a minute, under the step "
    "trained last and with gauges and totals only. Absent elsewhere.",
    ("seconds", "s", "How long the learner has waited."),
    ("groups", "groups", "Groups that came."),
    ("all_wrong", "groups", "Groups of these that were dropped because all completions are wrong."),
    ("all_right", "groups", "Groups of these that were dropped because all completions are right."),
    ("kept", "groups", "Groups of these that passed the filter."),
    ("truncated_share", "share", "Completions of these groups that ended at the length limit."),
)
_declare(
    "throughput",
    "Rates over the interval.",
    (
        "generated_tokens_per_s",
        "tokens/s",
        "Completion tokens that arrived from all workers, filtered groups included.",
    ),
    ("trained_tokens_per_s", "tokens/s", "Completion tokens trained."),
    ("generated_groups_per_s", "groups/s", "Groups that arrived from all workers, filtered ones included."),
    ("trained_groups_per_s", "groups/s", "Groups trained."),
)
_declare(
    "batch",
    "How the batch was cut for the forward passes.",
    ("tokens", "tokens", "Completion tokens of the batch."),
    ("microbatches", "passes", "Forward passes of the batch."),
    ("padding_share", "share", "Padding among all token places of the batch's forward passes."),
    ("shared_share", "share", "Tokens of the batch's sequences not computed because completions share their prompt."),
    (
        "unknown_tokens",
        "tokens",
        "Completion tokens of the batch that the tokenizer does not know, from a model's padded vocabulary.",
    ),
)
_declare(
    "heldout",
    "Held-out evaluation, on steps that have one.",
    ("accuracy", "share", "Right answers among all that were sampled (avg@k)."),
    ("accuracy_low", "share", "Lower end of its 95 % confidence interval, by bootstrap over prompts."),
    ("accuracy_high", "share", "Upper end of that interval."),
    ("pass_at_k", "share", "Held-out prompts with at least one right answer among k."),
    ("maj_at_k", "share", "Held-out prompts whose most frequent answer is right; ties count in part."),
    ("samples", "answers", "Answers sampled per held-out prompt: the k of avg@k and pass@k."),
    ("prompts", "prompts", "Held-out prompts evaluated."),
    ("length_mean", "tokens", "Mean length of the held-out answers."),
    ("truncated_share", "share", "Held-out answers that ended at the length limit."),
    ("version", "version", "The version that sampled all tokens of the evaluation."),
)
_declare(
    "progress",
    "How far the run is.",
    ("epoch", "passes", "Passes over the training prompts, the current one as a fraction."),
    ("prompts", "prompts", "Prompts taken from the stream, in total."),
    ("tokens", "tokens", "Completion tokens trained, in total."),
)
_declare(
    "memory",
    "Memory of the learner's process.",
    ("rss_bytes", "bytes", "Resident memory."),
    ("gpu_bytes", "bytes", "Most memory allocated on the learner's GPU in the interval; absent without one."),
)
