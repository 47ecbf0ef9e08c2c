"""The configuration of a run: frozen structs, one per TOML table, and the rules between their fields.

``toml`` builds them from TOML and checks types and bounds; constructing them directly checks only
the rules in ``__post_init__`` (msgspec validates on conversion). Every field says what it does and in
which unit; ``docs/config.md`` is generated from these descriptions.
"""

from datetime import date
from typing import Annotated as A
from typing import Literal

from msgspec import Meta, Struct, field

from dapo_async.transport.addresses import LOOPBACK, check_address, is_loopback

WeightsWay = Literal["auto", "full", "delta", "shm"]


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every table: frozen, keyword-only, closed to unknown keys."""


class Run(Section, frozen=True, kw_only=True):
    """What the run is called, where it writes, and when it ends."""

    name: A[str, Meta(min_length=1, description="Name of the run folder.")] = "run"
    folder: A[str, Meta(min_length=1, description="Folder that holds all run folders.")] = "runs"
    seed: A[int, Meta(ge=0, lt=2**31, description="Seed of prompt order, sampling and initialisation.")] = 0
    batches: A[int, Meta(ge=1, description="Stop after this many trained batches.")] = 100
    max_minutes: A[
        float,
        Meta(
            ge=0,
            le=1e6,
            description="Minutes of wall clock, warm start included, after which to stop; 0: none.",
        ),
    ] = 0.0
    target_accuracy: A[
        float, Meta(ge=0, le=1, description="Stop once a held-out evaluation reaches this share; 0: never.")
    ] = 0.0
    stall_timeout_s: A[
        float,
        Meta(gt=0, le=1e6, description="Seconds without any group arriving after which the learner saves and ends."),
    ] = 600.0

    def __post_init__(self) -> None:
        if "/" in self.name or self.name in (".", ".."):
            raise ValueError(f'run.name = "{self.name}" must be one folder name, without a slash; see run.folder')


class Model(Section, frozen=True, kw_only=True):
    """The policy."""

    path: A[str, Meta(description="Folder or hub id that transformers can load; filled in by [demo].")] = ""
    trust_remote_code: A[
        bool, Meta(description="Run the Python code that the model's folder or hub id brings; torch engine only.")
    ] = False
    precision: A[
        Literal["float32", "bfloat16"], Meta(description="Arithmetic of the learner; master weights stay float32.")
    ] = "float32"
    attention: A[
        Literal["auto", "sdpa", "eager", "varlen", "flash"],
        Meta(description="Attention of the learner. auto: flash-attn or PyTorch varlen on CUDA, sdpa elsewhere."),
    ] = "auto"
    forward: A[
        Literal["auto", "fused", "module"],
        Meta(description="Learner's forward pass. fused: own, Llama family on CPU; auto: that where proved at load."),
    ] = "auto"
    gradient_checkpointing: A[bool, Meta(description="Recompute activations in backward to save memory.")] = False
    device: A[Literal["auto", "cpu", "cuda"], Meta(description="Where the learner computes.")] = "auto"


class Demo(Section, frozen=True, kw_only=True):
    """A task, data and a tiny warm-started model made on the spot, so that nothing must be downloaded."""

    task: A[Literal["", "sums"], Meta(description="Which demo to build; empty: none.")] = ""
    cache: A[str, Meta(description="Folder that keeps built demos; empty: the user's cache folder.")] = ""
    train_prompts: A[int, Meta(ge=1, le=10**6, description="Number of training chains.")] = 20_000
    heldout_prompts: A[int, Meta(ge=1, le=10**5, description="Number of held-out chains, never trained on.")] = 512
    min_terms: A[int, Meta(ge=2, le=20, description="Fewest terms of a chain.")] = 3
    max_terms: A[int, Meta(ge=2, le=20, description="Most terms of a chain.")] = 7
    terse_share: A[
        float, Meta(ge=0, le=1, description="Probability of answering at once that the warm start teaches.")
    ] = 0.75
    warm_start_iterations: A[int, Meta(ge=0, le=10**6, description="Supervised optimizer steps of the warm start.")] = (
        500
    )
    warm_start_batch: A[int, Meta(ge=1, le=10**5, description="Examples per supervised step.")] = 64
    warm_start_lr: A[float, Meta(gt=0, le=1, description="Peak learning rate of the warm start.")] = 1.2e-2
    hidden_size: A[int, Meta(ge=8, le=4096, description="Width of the model.")] = 128
    layers: A[int, Meta(ge=1, le=64, description="Layers of the model.")] = 3
    threads: A[int, Meta(ge=0, le=256, description="CPU threads of the warm start; 0: all cores, at most 8.")] = 0

    def __post_init__(self) -> None:
        if self.min_terms > self.max_terms:
            raise ValueError(f"min_terms ({self.min_terms}) must not exceed max_terms ({self.max_terms})")


class Data(Section, frozen=True, kw_only=True):
    """Prompts with their ground truths."""

    train: A[
        str,
        Meta(
            description="Training prompts: a JSONL or Parquet file, a folder, or a hub id such as owner/name, the "
            "latter two with :split where there are several; filled in by [demo]."
        ),
    ] = ""
    heldout: A[str, Meta(description="Evaluation prompts, named like train; empty: no evaluation.")] = ""
    epochs: A[int, Meta(ge=0, description="Passes over the training prompts; 0: no limit.")] = 0
    shuffle: A[bool, Meta(description="Reshuffle the prompts in each pass, from run.seed.")] = True
    chat_template: A[
        Literal["auto", "never", "require"],
        Meta(description="auto: apply the tokenizer's chat template if it has one; never: contents as they are."),
    ] = "auto"
    template_date: A[
        str,
        Meta(
            pattern=r"^(\d{4}-\d{2}-\d{2})?$",
            description="Date that a chat template prints which asks for today's, YYYY-MM-DD; empty: the day on which "
            "the run began, also after --resume.",
        ),
    ] = ""
    max_prompt_tokens: A[int, Meta(ge=1, le=10**7, description="Longest prompt, in tokens.")] = 1024
    overlong_prompts: A[
        Literal["drop", "truncate_left", "refuse"],
        Meta(description="What happens to longer prompts; always counted. truncate_left keeps start token and end."),
    ] = "drop"

    def __post_init__(self) -> None:
        if self.template_date:
            try:
                date.fromisoformat(self.template_date)
            except ValueError:
                raise ValueError(f'template_date = "{self.template_date}" is no day of the calendar') from None


class Sampling(Section, frozen=True, kw_only=True):
    """How answers are sampled for training."""

    group_size: A[int, Meta(ge=2, le=4096, description="G: completions per prompt.")] = 8
    max_tokens: A[
        int,
        Meta(
            ge=1,
            le=10**7,
            description="L_max: longest completion, in tokens, stop token included; needed without [demo].",
        ),
    ] = 64
    temperature: A[
        float, Meta(gt=0, le=10, description="Sampling temperature; log-probs are of logits / temperature.")
    ] = 1.0
    top_p: A[float, Meta(gt=0, le=1, description="Must be 1: truncated sampling breaks the importance ratio.")] = 1.0
    top_k: A[int, Meta(ge=0, description="Must be 0 (off): truncated sampling breaks the importance ratio.")] = 0
    stop_token_ids: A[
        list[A[int, Meta(ge=0)]],
        Meta(
            description="Tokens that end a completion; empty: every end that generation config and tokenizer name, "
            "and <|im_end|>, <|endoftext|> and their like where the vocabulary has them."
        ),
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"top_p must be 1.0 and top_k 0 for training (got {self.top_p} and {self.top_k}): the learner's "
                "log-probs are of the full distribution, so the importance ratio of truncated sampling would be wrong"
            )


class Schedule(Section, frozen=True, kw_only=True):
    """Which groups are generated and trained when. See ``dapo_async.schedule.schedule``."""

    groups_per_batch: A[int, Meta(ge=1, le=10**6, description="B: groups per batch, after filtering.")] = 16
    max_staleness: A[int, Meta(ge=0, le=1000, description="η, in versions (batches); 0: synchronous DAPO.")] = 2
    oversample: A[
        float, Meta(ge=1, le=100, description="Factor on admitted groups; what cannot meet η is expired.")
    ] = 1.0
    straggler: A[
        Literal["wait", "late", "expire"],
        Meta(description="If a running lease is about to miss η: wait for it, train it late, or expire (cancel) it."),
    ] = "wait"
    priority: A[
        Literal["oldest", "freshest", "signal"],
        Meta(description="Trained first, within η: oldest leases, freshest weights, or signal: nearest to half right."),
    ] = "oldest"
    filter: A[bool, Meta(description="Dynamic sampling: drop groups that are all right or all wrong.")] = True
    max_filtered_batches: A[
        int,
        Meta(
            ge=0,
            le=10**6,
            description="The run saves and ends once this many times groups_per_batch groups were filtered and no "
            "batch formed; 0: no limit. 100: over 99 % filtered.",
        ),
    ] = 100


class Reward(Section, frozen=True, kw_only=True):
    """Verdicts and what is made of them."""

    verifier: A[
        str,
        Meta(
            min_length=1,
            description="sums, dapo_math, math_verify, exact, or module:function of your own, which gets (answer, "
            "truth) as texts and returns True or False, or (bool, answer seen); there are no graded rewards.",
        ),
    ] = "dapo_math"
    compare_with: A[
        str, Meta(description="Another verifier for the same answers: disagreement is logged, no reward changes.")
    ] = ""
    processes: A[
        int,
        Meta(
            ge=0,
            le=256,
            description="Processes per worker that verify; 0: 2 for math_verify, 1 for a function of your own.",
        ),
    ] = 0
    boxed_fallback: A[bool, Meta(description="dapo_math: accept \\boxed{} when there is no 'Answer:' line.")] = False
    timeout_s: A[
        float, Meta(gt=0, le=3600, description="Seconds one verification may take before it counts as wrong.")
    ] = 5.0
    overlong_cache_tokens: A[
        int, Meta(ge=0, description="L_cache of the soft overlong punishment, in tokens; 0: off.")
    ] = 0
    overlong_penalty: A[float, Meta(ge=0, le=100, description="Factor on the soft overlong punishment.")] = 1.0
    overlong_filter: A[bool, Meta(description="Mask truncated completions out of the loss.")] = False

    def __post_init__(self) -> None:
        if self.compare_with == self.verifier:
            raise ValueError(f'compare_with must name another verifier than verifier = "{self.verifier}"')


class Objective(Section, frozen=True, kw_only=True):
    """The policy loss. Defaults are DAPO's. See ``dapo_async.rl.loss``."""

    advantage_std: A[bool, Meta(description="Divide by the group's standard deviation; false: Dr.GRPO.")] = True
    ratio: A[Literal["token", "sequence"], Meta(description="Importance ratio per token, or GSPO's per sequence.")] = (
        "token"
    )
    surrogate: A[Literal["clip", "cispo"], Meta(description="Clipped surrogate, or CISPO's clipped weight.")] = "clip"
    clip_low: A[float, Meta(ge=0, le=1, description="ε_low: ratios are clipped below at 1 - clip_low.")] = 0.2
    clip_high: A[float, Meta(ge=0, le=1000, description="ε_high: ratios are clipped above at 1 + clip_high.")] = 0.28
    dual_clip: A[
        float, Meta(ge=0, le=1e6, description="c: cap of the loss of negative advantages at c·|A|; 0: off.")
    ] = 10.0
    ratio_against: A[
        Literal["behaviour", "proximal"],
        Meta(description="Denominator of the clipped ratio: sampler's log-probs, or the learner's at batch start."),
    ] = "behaviour"
    correction: A[
        Literal["none", "full", "truncate", "mask", "m2po"],
        Meta(description="Weight proximal/behaviour: none, decoupled PPO, TIS, IcePop, or M2PO's mask."),
    ] = "none"
    correction_cap: A[float, Meta(gt=0, le=1e6, description="Upper bound of the weight for truncate and mask.")] = 2.0
    correction_floor: A[float, Meta(ge=0, le=1, description="Lower bound of the weight for mask.")] = 0.5
    m2po_threshold: A[float, Meta(gt=0, le=100, description="Bound on the mean squared log-ratio kept by m2po.")] = 0.04
    aggregation: A[
        Literal[
            "token-mean",
            "token-sum",
            "seq-mean-token-mean",
            "seq-mean-token-sum",
            "seq-mean-token-sum-norm",
            "prompt-mean-token-mean",
        ],
        Meta(description="How token losses become one number."),
    ] = "token-mean"
    length_norm_tokens: A[
        int, Meta(ge=0, description="H of seq-mean-token-sum-norm, in tokens; 0: sampling.max_tokens.")
    ] = 0
    kl_coef: A[
        float, Meta(ge=0, le=1000, description="Weight of the KL penalty (k3) to the reference model; 0: off.")
    ] = 0.0
    entropy_coef: A[float, Meta(ge=0, le=1000, description="Weight of the entropy bonus; 0: off.")] = 0.0

    def __post_init__(self) -> None:
        if self.dual_clip and self.dual_clip <= 1.0 + self.clip_high:
            raise ValueError(f"dual_clip ({self.dual_clip}) must be 0 or exceed 1 + clip_high ({1.0 + self.clip_high})")
        if self.correction != "none" and self.ratio_against != "proximal":
            raise ValueError(
                f'correction = "{self.correction}" needs ratio_against = "proximal": '
                "against the behaviour log-probs the ratio is already the correction"
            )
        if self.correction_floor >= self.correction_cap:
            raise ValueError(
                f"correction_floor ({self.correction_floor}) must be below correction_cap ({self.correction_cap})"
            )


class Optimizer(Section, frozen=True, kw_only=True):
    """AdamW."""

    lr: A[float, Meta(gt=0, le=10, description="Peak learning rate.")] = 1e-6
    warmup_batches: A[int, Meta(ge=0, description="Batches of linear warm-up; batch k trains at lr·(k+1)/warmup.")] = 10
    beta1: A[float, Meta(ge=0, lt=1, description="AdamW β1.")] = 0.9
    beta2: A[float, Meta(ge=0, lt=1, description="AdamW β2.")] = 0.999
    eps: A[float, Meta(gt=0, le=1, description="AdamW ε.")] = 1e-8
    weight_decay: A[float, Meta(ge=0, le=10, description="Decoupled weight decay.")] = 0.1
    grad_clip: A[float, Meta(ge=0, le=1e6, description="Largest gradient norm; 0: off.")] = 1.0


class Learner(Section, frozen=True, kw_only=True):
    """How a batch is trained."""

    minibatches: A[
        int, Meta(ge=1, le=10**4, description="Optimizer steps per batch; must divide groups_per_batch.")
    ] = 1
    microbatch_tokens: A[int, Meta(ge=1, description="Token budget of one forward pass, padding included.")] = 8192
    logprob_chunk_tokens: A[int, Meta(ge=1, description="Tokens whose logits exist at one time.")] = 4096
    threads: A[int, Meta(ge=0, le=256, description="CPU threads of the learner; 0: a share of the cores.")] = 1
    on_mismatch: A[
        Literal["end", "warn"],
        Meta(
            description="If the workers' log-probs are far from the learner's for tokens of the very same weights: end "
            "after that batch, or only warn."
        ),
    ] = "end"


class Workers(Section, frozen=True, kw_only=True):
    """The rollout workers that ``train`` starts on this machine."""

    count: A[int, Meta(ge=0, le=1024, description="Worker processes to start; 0: they connect by themselves.")] = 1
    engine: A[Literal["torch", "vllm"], Meta(description="What generates.")] = "torch"
    slots: A[int, Meta(ge=1, le=65536, description="Completions decoded at the same time per worker.")] = 64
    prefetch_groups: A[
        int, Meta(ge=0, le=4096, description="Leases a worker holds beyond those that fill its slots.")
    ] = 2
    threads: A[int, Meta(ge=0, le=256, description="CPU threads per worker; 0: a share of the cores.")] = 1
    device: A[Literal["auto", "cpu", "cuda"], Meta(description="Where workers compute.")] = "auto"
    gpus: A[
        Literal["own", "shared"],
        Meta(description="own: each worker has its GPUs to itself, after the learner's; shared: dealt in turn."),
    ] = "own"
    kv_cache: A[
        Literal["keep", "recompute"], Meta(description="What happens to running sequences' KV cache at a weight swap.")
    ] = "keep"
    in_flight: A[
        bool, Meta(description="Swap weights while completions run; false: start none until the running ones ended.")
    ] = True
    max_restarts: A[
        int,
        Meta(
            ge=0,
            le=10**6,
            description="Restarts allowed per worker before it is given up, counted anew once it has run for an hour; "
            "the run ends with the last one.",
        ),
    ] = 3
    start_timeout_s: A[
        float, Meta(gt=0, le=1e5, description="Seconds a worker may load its model; one lost for as long is killed.")
    ] = 120.0
    step_delay_s: A[
        float, Meta(ge=0, le=60, description="Artificial delay per decode step, in seconds, to study slow workers.")
    ] = 0.0

    def capacity(self, group_size: int) -> int:
        """Leases that a worker holds at the same time: those that fill its slots, and ``prefetch_groups``."""
        return -(-self.slots // group_size) + self.prefetch_groups


class Vllm(Section, frozen=True, kw_only=True):
    """vLLM, where workers.engine = "vllm". Its max_num_seqs is workers.slots, its dtype weights.dtype."""

    tensor_parallel_size: A[int, Meta(ge=1, le=1024, description="GPUs that share each layer.")] = 1
    pipeline_parallel_size: A[int, Meta(ge=1, le=1024, description="GPUs that share the layers.")] = 1
    gpu_memory_utilization: A[
        float, Meta(gt=0, le=1, description="Share of each GPU's memory for weights and KV cache.")
    ] = 0.9
    kv_cache_gib: A[
        float,
        Meta(ge=0, le=1e5, description="KV cache of a worker, in GiB; 0: what its slots need (CPU), or what is left."),
    ] = 0.0
    enforce_eager: A[bool, Meta(description="No CUDA graphs; always so on CPU.")] = False
    engine_args: A[
        dict[str, str | int | float | bool],
        Meta(
            description="More arguments of vLLM's engine: strings, numbers, booleans; none that dapo-async sets itself."
        ),
    ] = field(default_factory=dict)


class Weights(Section, frozen=True, kw_only=True):
    """How weights reach the workers."""

    push_every: A[int, Meta(ge=1, le=1000, description="Publish every this many batches.")] = 1
    dtype: A[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="Serving precision; auto: the learner's precision."),
    ] = "auto"
    way: A[
        WeightsWay,
        Meta(
            description="auto: shared memory on this host, deltas to others; full: whole sets; delta: what changed; "
            "shm: shared memory on this host, whole sets to others."
        ),
    ] = "auto"


class Network(Section, frozen=True, kw_only=True):
    """Addresses and deadlines of the wire."""

    control: A[str, Meta(min_length=1, description="Address of control and groups; port * picks a free one.")] = (
        LOOPBACK
    )
    weights: A[str, Meta(min_length=1, description="Address of weights; port * picks a free one.")] = LOOPBACK
    keys: A[
        str,
        Meta(
            description="Folder of the learner's keys, made by dapo-async keys: encrypts the wire. Empty: plain text."
        ),
    ] = ""
    insecure: A[bool, Meta(description="Allow addresses beyond loopback without encryption.")] = False
    heartbeat_s: A[float, Meta(gt=0, le=3600, description="Seconds between heartbeats, both ways.")] = 1.0
    silence_s: A[
        float, Meta(gt=0, le=1e5, description="Seconds of silence after which a worker's leases are re-issued.")
    ] = 15.0
    learner_timeout_s: A[
        float, Meta(gt=0, le=1e6, description="Seconds a worker waits for a silent learner before it ends.")
    ] = 300.0
    max_message_mb: A[int, Meta(ge=1, le=2**20, description="Largest frame (one tensor, say) accepted, in MiB.")] = 1024

    def __post_init__(self) -> None:
        if self.silence_s <= 2 * self.heartbeat_s:
            raise ValueError(
                f"silence_s ({self.silence_s}) must exceed two heartbeats (heartbeat_s = {self.heartbeat_s})"
            )
        for name, address in (("control", self.control), ("weights", self.weights)):
            check_address(f"network.{name}", address, self.insecure or bool(self.keys))
        if self.keys and self.insecure:
            raise ValueError(
                "insecure = true says that the wire is not encrypted, and keys encrypt it: set one of them"
            )
        if self.control == self.weights and not self.control.endswith(":*"):
            raise ValueError(f'network.control and network.weights need different ports, both are "{self.control}"')
        if is_loopback(self.weights) and not is_loopback(self.control):
            raise ValueError(
                f'workers of other machines could not reach network.weights "{self.weights}": give it the host of '
                f'network.control "{self.control}"'
            )


class Evaluation(Section, frozen=True, kw_only=True):
    """Held-out evaluation, always at the start and the end when data.heldout is set; what ``eval`` does by default."""

    every: A[
        int, Meta(ge=0, description="Evaluate beside training every this many batches; 0: start and end only.")
    ] = 0
    samples: A[int, Meta(ge=1, le=10**5, description="k: completions per held-out prompt.")] = 1
    temperature: A[float, Meta(gt=0, le=10, description="Sampling temperature.")] = 1.0
    top_p: A[float, Meta(gt=0, le=1, description="Nucleus of the sampling distribution.")] = 1.0
    max_prompts: A[int, Meta(ge=0, description="Use only the first this many held-out prompts; 0: all.")] = 0


class Checkpoint(Section, frozen=True, kw_only=True):
    """Checkpoints; one is always written at the end and on Ctrl-C or SIGTERM."""

    every: A[int, Meta(ge=0, description="Write one every this many batches; 0: only at the end.")] = 20
    keep_last: A[int, Meta(ge=1, le=10**6, description="Checkpoints kept.")] = 2


class Logging(Section, frozen=True, kw_only=True):
    """What the run leaves to read."""

    samples_per_batch: A[int, Meta(ge=0, le=10**4, description="Completions per batch written to samples.jsonl.")] = 2
    text_every: A[int, Meta(ge=0, description="TensorBoard gets sample texts every this many batches; 0: never.")] = 10


class Config(Section, frozen=True, kw_only=True):
    """A whole run."""

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    demo: Demo = field(default_factory=Demo)
    data: Data = field(default_factory=Data)
    sampling: Sampling = field(default_factory=Sampling)
    schedule: Schedule = field(default_factory=Schedule)
    reward: Reward = field(default_factory=Reward)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    learner: Learner = field(default_factory=Learner)
    workers: Workers = field(default_factory=Workers)
    vllm: Vllm = field(default_factory=Vllm)
    weights: Weights = field(default_factory=Weights)
    network: Network = field(default_factory=Network)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)

    def __post_init__(self) -> None:
        if self.demo.task and (self.model.path or self.data.train or self.data.heldout):
            raise ValueError(
                "demo.task fills in model.path, data.train and data.heldout: leave those empty, or demo.task"
            )
        if not self.demo.task and not (self.model.path and self.data.train):
            raise ValueError("model.path and data.train are needed (or demo.task, which makes both)")
        if self.schedule.groups_per_batch % self.learner.minibatches:
            raise ValueError(
                f"learner.minibatches ({self.learner.minibatches}) must divide "
                f"schedule.groups_per_batch ({self.schedule.groups_per_batch})"
            )
        if self.learner.microbatch_tokens < self.longest_sequence_tokens:
            raise ValueError(
                f"learner.microbatch_tokens ({self.learner.microbatch_tokens}) must hold the longest sequence: "
                f"data.max_prompt_tokens + sampling.max_tokens = {self.longest_sequence_tokens}"
            )
        if self.reward.overlong_cache_tokens >= self.sampling.max_tokens:
            raise ValueError(
                f"reward.overlong_cache_tokens ({self.reward.overlong_cache_tokens}) must be below "
                f"sampling.max_tokens ({self.sampling.max_tokens})"
            )
        group_bytes = max(self.sampling.group_size, self.evaluation.samples) * (8 * self.sampling.max_tokens + 4096)
        if group_bytes > self.network.max_message_mb << 20:
            raise ValueError(
                f"network.max_message_mb ({self.network.max_message_mb}) must hold a group of the longest completions: "
                f"at least {-(-group_bytes >> 20)}"
            )
        if self.weights.push_every > self.schedule.max_staleness + 1:
            raise ValueError(
                f"weights.push_every ({self.weights.push_every}) must not exceed schedule.max_staleness + 1 "
                f"({self.schedule.max_staleness + 1}): older weights could never meet the staleness bound"
            )

    @property
    def serving_dtype(self) -> str:
        """Precision of the weights that workers serve, by its name in torch."""
        return self.model.precision if self.weights.dtype == "auto" else self.weights.dtype

    @property
    def longest_sequence_tokens(self) -> int:
        """Longest prompt plus longest completion, in tokens."""
        return self.data.max_prompt_tokens + self.sampling.max_tokens
