"""The default configuration, one commented line a field, and its validation.

Every experiment in `configs/` starts from `get_config()` and changes what it needs; every
field can be overridden on the command line as `--config.section.field=value`.
"""

import math

import ml_collections


class UserError(Exception):
    """A mistake that the user can correct: shown as one line, exit code 2, no traceback.

    The message names the field (or file), the value found and the remedy.
    """


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults: ELECTRA-Small as published (paper, Table 6)."""
    c = ml_collections.ConfigDict()

    c.model = m = ml_collections.ConfigDict()
    m.vocab_size = 0                 # rows of the token table; 0: as many as the tokenizer has
    m.embedding_size = 128           # width of the embedding tables, shared by both networks
    m.hidden_size = 256              # width of the discriminator
    m.num_layers = 12                # layers of the discriminator
    m.num_heads = 4                  # attention heads of the discriminator
    m.intermediate_size = 1024       # width of the feed-forward layers
    m.max_positions = 512            # rows of the position table (absolute positions only)
    m.type_vocab_size = 2            # segments A and B
    m.generator_size = 0.25          # generator's share of hidden size, feed-forward width and heads
    m.generator_layers = 1.0         # generator's share of the layers
    m.generator_heads = 0            # the generator's attention heads; 0: of the discriminator's head size
    m.generator_intermediate_size = 0    # width of its feed-forward layers; 0: in the discriminator's proportion
    m.generator_embedding_size = 0   # width of its own tables (sharing "none"); 0: as wide as the generator
    m.sharing = "embeddings"         # what the two networks share: "embeddings", "all" (equal sizes) or "none"
    m.positions = "absolute"         # "absolute" (learned table) or "rotary"
    m.rotary_theta = 10_000.0        # base of the rotary wavelengths
    m.norm = "post"                  # LayerNorm after each residual sum ("post", as BERT) or before each block ("pre")
    m.layer_norm_eps = 1e-12         # added to the variance
    m.initializer_range = 0.02       # standard deviation of the truncated normal
    m.hidden_dropout = 0.1           # after embeddings, attention output and feed-forward output
    m.attention_dropout = 0.1        # on attention probabilities
    m.attention = "xla"              # "xla", or flash attention: "flash" (NVIDIA GPU); without attention_dropout also
    #                                  "cudnn" (NVIDIA GPU, bfloat16), "splash" (TPU, data.seq_len a multiple of 128)
    m.scan_layers = False            # compile one layer and loop over it: faster to compile, a little slower to run
    m.scan_unroll = 1                # layers a turn of that loop; all of them on a GPU: no loop, and few, large updates
    m.remat = "none"                 # recompute in the backward pass: "none", "dots" (keep matmul results) or "full"
    m.dtype = "float32"              # of the computation, "bfloat16" on accelerators; parameters stay float32

    c.objective = o = ml_collections.ConfigDict()
    o.name = "electra"               # "electra", or "mlm": masked language modelling with the full-size network
    o.mask_prob = 0.15               # share of the tokens that is selected
    o.mask_token_prob = 0.85         # share of the selected that shows as [MASK], the rest keep their token
    o.distinct_positions = True      # False: drawn with replacement, colliding ids averaged, as the original does
    o.sampler = "two_level"          # exact softmax draw: "two_level" (one uniform a level) or "gumbel" (one an entry)
    o.temperature = 1.0              # of the generator's softmax when it samples
    o.disallow_correct = False       # never sample the original token
    o.mlm_chunks = 1                 # parts in which the generator's vocabulary logits are made, for less memory
    o.generator_dropout = True       # False: the generator trains and samples without dropout
    o.uniform_generator = False      # sample from the uniform distribution instead of the generator's
    o.mlm_weight = 1.0               # of the generator's loss in the sum
    o.rtd_weight = 50.0              # of the discriminator's loss in the sum (lambda in the paper)

    c.data = d = ml_collections.ConfigDict()
    d.source = "pydocs"              # pydocs | text:GLOB | jsonl:GLOB#field | parquet:GLOB#column |
    #                                  tfds:NAME[/CONFIG]:SPLIT#feature; several joined by ";", @ gives a weight:
    #                                  "text:a/*.txt.xz@2;jsonl:b.jsonl#body" (docs/data.md)
    d.text_documents = "blank"       # in text files a document ends at a "blank" line, or is a "line" or "file"
    d.path = ""                      # folder of the token store; "": WORKDIR/tokens
    d.tokenizer = "train"            # "train" a SentencePiece model, or a path: *.model, vocab.txt, tokenizer.json
    d.vocab_size = 4096              # pieces of the SentencePiece model to train
    d.lowercase = True               # lower-case the text (WordPiece vocabularies and trained SentencePiece models)
    d.strip_accents = "auto"         # WordPiece: "auto" strips them when lower-casing (as BERT), "yes" or "no"
    d.eval_fraction = 0.01           # share of the documents that is held out for evaluation
    d.num_workers = 0                # processes of `prepare`; 0: one a core
    d.seq_len = 128                  # tokens a sequence, specials included
    d.batch_size = 128               # sequences a step over all devices and hosts
    d.segment_pairs = True           # [CLS] A [SEP] B [SEP] from one document; False: [CLS] A [SEP]
    d.single_segment_prob = 0.1      # with segment pairs, share of the pieces that stay [CLS] A [SEP]
    d.short_prob = 0.05              # about this share of the pieces is cut short at random
    d.pack = True                    # short pieces share a sequence, attention within each; False: a sequence each
    d.prefetch = 4                   # batches made ahead of the device

    c.optimizer = t = ml_collections.ConfigDict()
    t.learning_rate = 5e-4           # peak
    t.steps = 1_000_000              # updates in the run
    t.warmup_steps = 10_000          # linear, multiplied with the decay as published
    t.end_learning_rate = 0.0        # at the last step
    t.decay_power = 1.0              # of the polynomial decay, 1: linear
    t.beta1 = 0.9                    # decay of the first moment
    t.beta2 = 0.999                  # decay of the second moment
    t.epsilon = 1e-6                 # added outside the root
    t.weight_decay = 0.01            # decoupled; not on biases and LayerNorm
    t.bias_correction = False        # of Adam's moments; the original has none
    t.clip_norm = 1.0                # of the gradient over all parameters; 0: no clipping
    t.accumulation_steps = 1         # microbatches a step

    c.mesh = h = ml_collections.ConfigDict()
    h.data = -1                      # copies of the model, each with its share of the batch; -1: all devices left
    h.fsdp = 1                       # devices that share one copy of the parameters, and split the batch
    h.tensor = 1                     # devices that split heads and feed-forward layers

    c.run = r = ml_collections.ConfigDict()
    r.seed = 0                       # of initialisation, masking, sampling, dropout and data order
    r.dropout_rng = "threefry"       # generator of dropout's bits alone: "threefry" (the same on every mesh), "rbg" or
    #                                  "unsafe_rbg" (the hardware's own on TPU and GPU; bits may change with the mesh)
    r.steps_per_dispatch = 1         # steps that the device takes at one command, where nothing is due in between
    r.init_from = ""                 # checkpoint folder whose parameters this run starts with, step counted from 0
    r.init_optimizer = False         # take its Adam moments and step count as well, and go on with its schedule
    r.log_every_steps = 100          # steps between two lines of metrics
    r.eval_every_steps = 5_000       # steps between two evaluations on held-out documents; 0: only at the end
    r.eval_batches = 100             # held-out batches an evaluation
    r.checkpoint_every_steps = 10_000    # steps between two checkpoints; 0: by time only
    r.checkpoint_every_minutes = 15.0    # minutes between two checkpoints; 0: by steps only
    r.keep_checkpoints = 3           # newest checkpoints kept
    r.tensorboard = True             # write event files to WORKDIR/tensorboard
    r.show_examples = 4              # held-out sentences printed at the end
    r.compilation_cache = ""         # folder of compiled programs; "": ~/.cache/electra_jax/xla, "off": none
    return c


def restored(stored: dict) -> ml_collections.ConfigDict:
    """Returns the config of a checkpoint, `stored` by this or another version.

    Fields that did not exist then get their default, which means what was done then; fields unknown here are left out.
    """
    c = get_config()
    for section, fields in c.items():
        fields.update({name: value for name, value in stored.get(section, {}).items() if name in fields})
    return c


def reference(c: ml_collections.ConfigDict) -> None:
    """Switches the original code's quirks on (read in google-research/electra).

    What has no switch: docs/decisions.md.
    """
    c.objective.distinct_positions = False    # draws collide, and colliding ids are averaged
    c.objective.mask_token_prob = 0.85        # the paper's text says 1.0
    c.objective.sampler = "gumbel"
    c.data.pack = False                       # a document's last sequence is padded
    c.optimizer.bias_correction = False


def apply_variants(c: ml_collections.ConfigDict, names: str, variants: dict | None = None) -> ml_collections.ConfigDict:
    """Applies the comma-separated variants behind the colon of `--config=FILE:VARIANT` and returns `c`.

    Every config knows `reference`; `variants` maps further names to functions that change the config.
    Raises UserError for an unknown name.
    """
    variants = {"reference": reference} | (variants or {})
    for name in filter(None, names.split(",")):
        if name not in variants:
            raise UserError(f"--config=...:{name} is not a variant of this config: choose from {', '.join(variants)}.")
        variants[name](c)
    return c


_CHOICES = {
    "model.sharing": ("embeddings", "all", "none"),
    "model.positions": ("absolute", "rotary"),
    "model.norm": ("post", "pre"),
    "model.attention": ("xla", "flash", "cudnn", "splash"),
    "model.remat": ("none", "dots", "full"),
    "model.dtype": ("float32", "bfloat16"),
    "objective.name": ("electra", "mlm"),
    "objective.sampler": ("two_level", "gumbel"),
    "run.dropout_rng": ("threefry", "rbg", "unsafe_rbg"),
    "data.text_documents": ("blank", "line", "file"),
    "data.strip_accents": ("auto", "yes", "no"),
}

# (smallest allowed, largest allowed) of numeric fields, both inclusive.
_RANGES = {
    "model.scan_unroll": (1, math.inf),
    "model.vocab_size": (0, math.inf), "model.embedding_size": (1, math.inf), "model.hidden_size": (1, math.inf),
    "model.num_layers": (1, math.inf), "model.num_heads": (1, math.inf), "model.intermediate_size": (1, math.inf),
    "model.max_positions": (1, math.inf), "model.type_vocab_size": (1, math.inf),
    "model.generator_size": (1e-6, 16), "model.generator_layers": (1e-6, 16),
    "model.generator_heads": (0, math.inf), "model.generator_intermediate_size": (0, math.inf),
    "model.generator_embedding_size": (0, math.inf),
    "model.rotary_theta": (1e-3, math.inf), "model.layer_norm_eps": (0, 1), "model.initializer_range": (0, math.inf),
    "model.hidden_dropout": (0, 0.99), "model.attention_dropout": (0, 0.99),
    "objective.mask_prob": (0.001, 0.9), "objective.mask_token_prob": (0, 1), "objective.temperature": (1e-3, 1e3),
    "objective.mlm_weight": (0, math.inf), "objective.rtd_weight": (0, math.inf),
    "objective.mlm_chunks": (1, math.inf),
    "data.vocab_size": (64, 1_000_000), "data.eval_fraction": (0, 0.5), "data.num_workers": (0, 4096),
    "data.seq_len": (8, 65536), "data.batch_size": (1, math.inf), "data.single_segment_prob": (0, 1),
    "data.short_prob": (0, 1), "data.prefetch": (0, 1024),
    "optimizer.learning_rate": (0, math.inf), "optimizer.steps": (1, math.inf), "optimizer.warmup_steps": (0, math.inf),
    "optimizer.end_learning_rate": (0, math.inf), "optimizer.decay_power": (1e-3, 100),
    "optimizer.beta1": (0, 0.999999), "optimizer.beta2": (0, 0.99999999), "optimizer.epsilon": (0, 1),
    "optimizer.weight_decay": (0, math.inf), "optimizer.clip_norm": (0, math.inf),
    "optimizer.accumulation_steps": (1, math.inf),
    "mesh.data": (-1, math.inf), "mesh.fsdp": (-1, math.inf), "mesh.tensor": (-1, math.inf),
    "run.seed": (0, 2**31 - 1), "run.steps_per_dispatch": (1, 1000),
    "run.log_every_steps": (1, math.inf), "run.eval_every_steps": (0, math.inf),
    "run.eval_batches": (1, math.inf), "run.checkpoint_every_steps": (0, math.inf),
    "run.checkpoint_every_minutes": (0, math.inf), "run.keep_checkpoints": (1, math.inf),
    "run.show_examples": (0, 1000),
}


def get(config: ml_collections.ConfigDict, field: str):
    """Returns the value of a dotted field name, such as "model.hidden_size"."""
    section, name = field.split(".")
    return config[section][name]


def num_masked(config: ml_collections.ConfigDict) -> int:
    """Slots for selected positions a sequence: floor((mask_prob + 0.005) * seq_len), as the original.

    A packed sequence gets the same number: it holds as many tokens as one long piece.
    """
    return max(1, math.floor((config.objective.mask_prob + 0.005) * config.data.seq_len))


def check_fields(config: ml_collections.ConfigDict, choices: dict, ranges: dict) -> None:
    """Raises UserError for the first field that is none of its `choices` or outside its range, alone.

    Fields are named "section.field"; a range is (smallest, largest), both allowed. The mesh is checked as well.
    """
    for field, allowed in choices.items():
        if get(config, field) not in allowed:
            raise UserError(f"{field}={get(config, field)!r} is not one of {', '.join(allowed)}.")
    for field, (low, high) in ranges.items():
        value = get(config, field)
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"{field}={value} is out of range: give a value {bounds}.")
    for field in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        if get(config, field) == 0:
            raise UserError(f"{field}=0: give the number of devices, or -1 for all that are left.")


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first field whose value cannot work, alone or with the others."""
    if "objective" not in config:
        raise UserError("--config: this is no pretraining config (has no section objective): configs/finetune/ belongs "
                        "to electra_jax.finetune.")
    check_fields(config, _CHOICES, _RANGES)
    m, d = config.model, config.data
    if config.objective.name == "mlm" and config.objective.uniform_generator:
        raise UserError("objective.uniform_generator=True leaves nothing to train with objective.name=mlm: set it to "
                        "False, or objective.name=electra.")
    if m.hidden_size % m.num_heads:
        raise UserError(f"model.hidden_size={m.hidden_size} does not divide by model.num_heads={m.num_heads}: "
                        "change one of them.")
    if m.positions == "rotary" and (m.hidden_size // m.num_heads) % 2:
        raise UserError(f"model.num_heads={m.num_heads} gives heads of {m.hidden_size // m.num_heads}: "
                        "rotary positions need an even head size.")
    if m.positions == "absolute" and d.seq_len > m.max_positions:
        raise UserError(f"data.seq_len={d.seq_len} exceeds model.max_positions={m.max_positions}: "
                        "shorten the sequences, raise model.max_positions or set model.positions=rotary.")
    if m.sharing == "all" and (m.generator_size != 1 or m.generator_layers != 1):
        raise UserError(f"model.sharing=all needs equal networks, but model.generator_size={m.generator_size} and "
                        f"model.generator_layers={m.generator_layers}: set both to 1.0.")
    if m.generator_embedding_size and m.sharing != "none":
        raise UserError(f"model.generator_embedding_size={m.generator_embedding_size} needs tables of the generator's "
                        f"own, but model.sharing={m.sharing}: set it to 0, or model.sharing=none.")
    if d.segment_pairs and m.type_vocab_size < 2:
        raise UserError(f"model.type_vocab_size={m.type_vocab_size} is too small for data.segment_pairs=True: "
                        "set it to 2, or data.segment_pairs=False.")
    if m.attention == "cudnn" and (m.attention_dropout or m.dtype != "bfloat16"):
        raise UserError(f"model.attention=cudnn needs model.dtype=bfloat16 (is {m.dtype}) and "
                        f"model.attention_dropout=0 (is {m.attention_dropout}).")
    if m.attention == "splash" and m.attention_dropout:
        raise UserError(f"model.attention=splash has no dropout, but model.attention_dropout={m.attention_dropout}: "
                        "set it to 0, or model.attention=xla.")
    if d.batch_size % config.optimizer.accumulation_steps:
        raise UserError(f"data.batch_size={d.batch_size} does not divide by optimizer.accumulation_steps="
                        f"{config.optimizer.accumulation_steps}: change one of them.")
    if config.run.init_optimizer and not config.run.init_from:
        raise UserError("run.init_optimizer=True needs a checkpoint to take the moments from: set run.init_from.")
    if not config.run.checkpoint_every_steps and not config.run.checkpoint_every_minutes:
        raise UserError("run.checkpoint_every_steps=0 and run.checkpoint_every_minutes=0: "
                        "set one of them, or a kill loses the run.")
