"""From the results of ``gpu`` and ``gpu_runs`` to the lines of its Markdown tables."""

from docs.generators.tables import Result, number, table


def gpu(result: Result) -> list[str]:
    """A table for each part that was measured."""
    parts = {"training": _training, "logprobs": _logprobs, "publishing": _publishing, "sampling": _sampling}
    lines: list[str] = []
    for name, make in parts.items():
        if name in result:
            lines += [*make(result[name]), ""]
        else:
            lines += [f"{name.capitalize()}: not measured yet: `dapo-async bench gpu --parts {name} --out FILE`.", ""]
    return lines[:-1]


def _training(part: Result) -> list[str]:
    rows = [
        [
            name,
            number(found["tokens_per_s"]["median"]),
            number(found["model_tflops"]),
            f"{found['share_of_limit']:.0%}",
            f"{found['peak_gib']:.1f}",
            f"{found['estimate_gib']:.1f}",
        ]
        for name, found in part.items()
        if isinstance(found, dict)
    ]
    told = (
        f"A training step of 0.6 B parameters in bfloat16 on {number(part['answer_tokens'])} tokens of ragged answers; "
        f"the limit is a product of large matrices, {part['limit_tflops']:.0f} TFLOP/s."
    )
    header = ["attention", "answer tokens/s", "model TFLOP/s", "of the limit", "peak, GiB", "estimated, GiB"]
    return [told, "", *table(header, rows)]


def _logprobs(part: Result) -> list[str]:
    rows = [
        [name, f"{found['peak_gib']:.1f}", f"{1000 * found['seconds']['median']:.0f}"] for name, found in part.items()
    ]
    told = "Log-probs of 16,384 tokens over 151,936 words, forward and backward."
    return [told, "", *table(["logits", "peak, GiB", "ms"], rows)]


def _publishing(part: Result) -> list[str]:
    plain, rows = part["nothing published"]["step_s"]["median"], []
    for name, found in part.items():
        if not isinstance(found, dict):
            continue
        step = found["step_s"]["median"]
        copied = [f"{found['copy_s']['median']:.2f}", f"{found['gb_per_s']:.1f}"] if "copy_s" in found else ["", ""]
        rows.append([name, *copied, f"{step:.2f}", f"{step / plain - 1:+.1%}"])
    told = f"Weights of {part['set_bytes'] / 2**30:.2f} GiB leave the GPU during a training step, digest included."
    return [told, "", *table(["copy", "s", "GB/s", "training step, s", "longer by"], rows)]


def _sampling(part: Result) -> list[str]:
    rows = [[name, number(found["tokens_per_s"]["median"])] for name, found in part.items()]
    return ["The torch engine, which is for trying things out.", "", *table(["model", "tokens/s"], rows)]


def gpu_runs(part: Result) -> list[str]:
    """Every run of both kinds."""
    rows = []
    for name, found in part["rounds"].items():
        for index, one in enumerate(found):
            busy = f"{one['gpu_busy']:.0%}" if "gpu_busy" in one else ""
            rates = [number(one[key]) for key in ("groups_per_s", "trained_tokens_per_s", "generated_tokens_per_s")]
            rows.append([f"{name}, round {index + 1}", *rates, f"{one['learner']['busy']:.0%}", busy])
    told = (
        f"The quickstart's frozen policy, {part['workers']} workers and the learner on one GPU, "
        f"{part['batches']} batches: asynchronous over synchronous {part['speedup']['median']:.2f}×."
    )
    header = ["run", "groups/s", "trained tokens/s", "generated tokens/s", "learner busy", "GPU busy"]
    return [told, "", *table(header, rows)]
