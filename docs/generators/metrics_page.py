"""Generates ``docs/metrics.md`` from ``observe.metrics``: where to look first, then every metric, unit and meaning.

Owns the page's layout and the questions on top of it.
"""

from dapo_async.observe.metrics import METRICS, SECTIONS
from docs.generators.page import note, run

MODULE = "docs.generators.metrics_page"

# Where to look first: question, curves, worry when.
FIRST_LOOK = (
    (
        "Does it learn?",
        "heldout/accuracy accuracy/generated",
        "neither rises. (Not `accuracy/trained`: the filter keeps it in the middle. `evaluation.every` gives a curve)",
    ),
    (
        "Is there something to learn from?",
        "groups/filtered_share",
        "it nears 1: prompts too easy (`groups/filtered_all_right`) or too hard (`groups/filtered_all_wrong`)",
    ),
    (
        "Is it stable?",
        "policy/entropy optimizer/grad_norm optimizer/skipped length/truncated_share",
        "entropy falls to 0 or climbs; the norm jumps; steps are skipped; more and more answers are cut off",
    ),
    (
        "Is the data too old?",
        "policy/ess_share policy/kl_behaviour_k3 staleness/max",
        "the first falls or the second climbs: lower `schedule.max_staleness`, or set an `objective.correction`",
    ),
    (
        "Do sampler and learner agree?",
        "mismatch/mean",
        "it grows, or exceeds the band that `dapo-async check CONFIG --parity` tells",
    ),
    (
        "Who waits for whom?",
        "time_share/wait_* worker_time/idle",
        "the learner waits for generation: more workers; the workers idle: a faster learner (`dapo-async plan RUN`)",
    ),
    (
        "Are machines lost?",
        "workers/alive workers/given_up",
        "fewer are alive than were started; a worker was given up",
    ),
    (
        "Does the verifier work?",
        "verifier/errors verifier/timeouts",
        "they rise: such answers count as wrong, and the workers' logs say why",
    ),
)


def metrics_page() -> str:
    """The text of ``docs/metrics.md``: one table per section, from the declarations."""
    lines = [
        "# Metrics",
        "",
        note(MODULE, "metrics.md"),
        "",
        "A run logs these numbers to TensorBoard and, the same, to `metrics.jsonl` in its folder: one JSON object per",
        "line with `step` (batches trained), `wall_s` (seconds this run has been running, pauses between resumes left",
        "out) and the numbers by name. What a step does not have is absent; what is not finite is `null`. Lines of the",
        "same step belong together. A name that is not declared here cannot be logged. `*` stands for words known only",
        "at run time.",
        "",
        '"The batch" is the batch trained in that step; "the interval" is the time since the step logged before it;',
        '"in total" means since the start of the run, through resumes.',
        "",
        "## Look at these first",
        "",
        "| question | curves | worry when |",
        "|---|---|---|",
        *(f"| {question} | {_code(names)} | {worry} |" for question, names, worry in FIRST_LOOK),
    ]
    for section, sentence in SECTIONS.items():
        lines += ["", f"## {section}", "", sentence, "", "| name | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in METRICS.values() if m.section == section]
    return "\n".join(lines) + "\n"


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split())


if __name__ == "__main__":
    run(MODULE, metrics_page)
