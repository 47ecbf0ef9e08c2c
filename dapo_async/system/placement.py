"""Which GPUs of this machine the local workers compute on. Pure: it counts devices that it is told of.

The learner is one process on the first GPU that it sees. A worker takes one GPU, vLLM's as many as
``tensor_parallel_size`` x ``pipeline_parallel_size``. ``launch`` hands a placement to the supervisor as environment,
``memory_check`` adds up what shares a GPU, and ``dapo-async check`` prints it. Workers that connect from elsewhere
are placed by whoever starts them.
"""

from collections.abc import Mapping, Sequence

from dapo_async.config.settings import Config
from dapo_async.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus_per_worker(config: Config) -> int:
    """GPUs that one worker computes on."""
    if config.workers.engine == "torch":
        return 1
    return config.vllm.tensor_parallel_size * config.vllm.pipeline_parallel_size


def wanted_gpus(config: Config) -> int:
    """Fewest GPUs of a machine on which learner and local workers have their place; of a worker's if it has none."""
    count, each = config.workers.count, gpus_per_worker(config)
    if config.workers.gpus == "shared" or not count:
        return each
    return (config.model.device != "cpu") + count * each


def place_workers(config: Config, num_gpus: int, *, learner: bool) -> list[tuple[int, ...]]:
    """GPUs of each local worker, as indices into those that this process sees; empty if workers use no GPU.

    ``num_gpus``: how many this process sees; ``learner``: whether a learner computes on this machine too. Own GPUs
    follow the learner's. Shared ones are dealt in turn, the learner's last. Raises ``ConfigError`` if there are too
    few.
    """
    workers, each = config.workers, gpus_per_worker(config)
    if not num_gpus or workers.device == "cpu" or not workers.count:
        return []
    taken = int(learner and config.model.device != "cpu")
    if workers.gpus == "shared":
        order = [*range(taken, num_gpus), *range(taken)]
        places = [tuple(order[start : start + each]) for start in range(0, num_gpus - each + 1, each)]
        if not places:
            raise ConfigError(_told(config, each, num_gpus, "a worker"))
        return [places[number % len(places)] for number in range(workers.count)]
    if taken + workers.count * each > num_gpus:
        who = f"{workers.count} workers" if workers.count > 1 else "a worker"
        also = f"{who} and the learner" if taken else who
        told = _told(config, taken + workers.count * each, num_gpus, also)
        raise ConfigError(told + (', or set workers.gpus = "shared"' if each <= num_gpus else ""))
    return [tuple(range(taken + n * each, taken + (n + 1) * each)) for n in range(workers.count)]


def visible_to(places: Sequence[tuple[int, ...]], env: Mapping[str, str]) -> list[dict[str, str]]:
    """What each worker's environment gets besides ``env``, in which the user may have named the GPUs to use."""
    named = [name.strip() for name in env[VISIBLE].split(",")] if env.get(VISIBLE) else None
    return [{VISIBLE: ",".join(named[gpu] if named else str(gpu) for gpu in place)} for place in places]


def describe(places: Sequence[tuple[int, ...]], config: Config) -> str:
    """One line of who computes where."""
    learner = [] if config.model.device == "cpu" else ["learner on GPU 0"]
    workers = [
        f"w{number} on GPU{'s' if len(place) > 1 else ''} {', '.join(map(str, place))}"
        for number, place in enumerate(places)
    ]
    return f"# placement: {'; '.join([*learner, *workers])}"


def _told(config: Config, needed: int, num_gpus: int, who: str) -> str:
    settings = "workers.count" if config.workers.gpus == "own" else ""
    if gpus_per_worker(config) > 1:
        parallel = "vllm.tensor_parallel_size x pipeline_parallel_size"
        settings = f"{settings} or {parallel}" if settings else parallel
    return (
        f'workers.gpus = "{config.workers.gpus}": {who} would need {needed} GPUs here, and there are {num_gpus}: '
        f"lower {settings}"
    )
