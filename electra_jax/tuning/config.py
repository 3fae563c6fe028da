"""The default fine-tuning configuration, one commented line a field, and its validation."""

import math
import re

import ml_collections

from electra_jax import config as pretraining
from electra_jax.config import UserError

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults: GLUE with ELECTRA-Small as published (paper, Table 7)."""
    c = ml_collections.ConfigDict()
    c.init_from = ""                 # what to tune: workdir, one of its checkpoints, exported or Hugging Face folder
    c.init_random = False            # draw fresh parameters of the same sizes: what pretraining must beat

    c.task = t = ml_collections.ConfigDict()
    t.kind = "glue"                  # "glue", "squad", "tagging" or "text" (your own files)
    t.name = "sst2"                  # glue: one of cola sst2 mrpc stsb qqp mnli qnli rte wnli; else any
    t.data_dir = ""                  # glue, squad: folder of the official files; glue: also "tfds" or "tfds:DIR"
    t.train = ""                     # text, tagging, squad: file to train on
    t.dev = ""                       # file to choose and report by; "": a tenth of train is held out (not for squad)
    t.test = ""                      # file to predict, answers not needed; "": none
    t.text = "text"                  # text: column of the (first) text, by name, or by number where there is no header
    t.text_pair = ""                 # text: column of the second text; "": none
    t.label = "label"                # text: column of the class or the score
    t.label_type = "auto"            # text: "class", "score", or "auto": numbers with a fraction are scores
    t.swap_pairs = True              # mrpc, stsb: train on both orders of a pair, as the original does
    t.version = "v1.1"               # squad: "v1.1", or "v2.0" with questions that have no answer
    t.doc_stride = 128               # squad: tokens between the starts of two windows over a context
    t.max_query = 64                 # squad: longest question in tokens
    t.max_answer = 30                # squad: longest answer in tokens
    t.n_best = 20                    # squad: starts and ends considered a window
    t.word_column = 0                # tagging: column of the word
    t.tag_column = -1                # tagging: column of the tag
    t.scheme = "auto"                # tagging: "bio", "iob1", "bioes", "plain" (one tag a word), "auto": found in train
    t.train_scheme = "bioes"         # tagging: scheme the network learns; the original's chunking does BIOES
    t.segment_ones = True            # tagging: all segment ids 1, as the original does

    c.model = m = ml_collections.ConfigDict()
    m.head = "electra"               # "electra": one dense layer; "huggingface": dense, GELU, dense
    m.qa_head = "joint"              # squad: "joint" (end given start, answerability; the original's) or "plain"
    m.hidden_dropout = 0.1           # after embeddings, attention output and feed-forward output
    m.attention_dropout = 0.1        # on attention probabilities
    m.head_dropout = 0.1             # on what the head reads
    m.dtype = "float32"              # of the computation, "bfloat16" on accelerators
    m.attention = "xla"              # "xla" or "cudnn", as in pretraining
    m.scan_layers = False            # compile one layer and loop over it: faster to compile, a little slower to run
    m.remat = "none"                 # recompute in the backward pass: "none", "dots" or "full"

    c.data = d = ml_collections.ConfigDict()
    d.seq_len = 128                  # longest sequence in tokens, specials included
    d.batch_size = 32                # sequences a step
    d.eval_batch_size = 64           # sequences a batch of an evaluation
    d.bucket = 8                     # batches are padded to a multiple of this; few shapes, few compiles
    d.pool_batches = 50              # that many batches are drawn at random, then sorted by length; 1: no sorting

    c.optimizer = o = ml_collections.ConfigDict()
    o.learning_rate = 3e-4           # of the head; paper: small 3e-4, base 1e-4, large 5e-5 (code: small 1e-4)
    o.layer_decay = 0.8              # each layer below learns that much slower; paper: 0.8, large 0.9
    o.layer_decay_rule = "original"  # "original": the top layer already at decay^2 (its code), "paper": at decay^1
    o.epochs = 0.0                   # passes over train; 0: as published, 3, for rte and stsb 10, for squad 2
    o.warmup = 0.1                   # share of the steps
    o.weight_decay = 0.01            # decoupled; code 0.01, paper 0
    o.beta1 = 0.9                    # decay of the first moment
    o.beta2 = 0.999                  # decay of the second moment
    o.epsilon = 1e-6                 # added outside the root
    o.bias_correction = False        # of Adam's moments; the original has none
    o.clip_norm = 1.0                # of the gradient over all parameters; 0: no clipping
    o.loss_sum = True                # the loss is a batch's sum, as in the original, and clipping nearly always on

    c.mesh = h = ml_collections.ConfigDict()
    h.data = -1                      # copies of the model, each with its share of the batch; -1: all devices left
    h.fsdp = 1                       # devices that share one copy of the parameters, and split the batch
    h.tensor = 1                     # devices that split heads and feed-forward layers

    c.run = r = ml_collections.ConfigDict()
    r.tasks = ""                     # several GLUE tasks in one command, by comma; "all": those in data_dir
    r.seeds = 1                      # runs a task, with the seeds seed, seed + 1, ...
    r.seed = 0                       # of the head, dropout and data order
    r.log_every_steps = 50           # steps between two lines of metrics
    r.evals_per_epoch = 1            # evaluations on dev a pass
    r.patience = 0                   # stop after that many evaluations without a better score; 0: never
    r.select = "best"                # parameters that are kept: "best" on dev, or "last" (the original's way)
    r.max_steps = 0                  # stop after that many steps, for trials; 0: all
    r.save = True                    # keep a checkpoint of each run, for `predict` and `export`
    r.tensorboard = True             # write event files
    r.compilation_cache = ""         # folder of compiled programs; "": ~/.cache/electra_jax/xla, "off": none
    return c


def epochs(config: ml_collections.ConfigDict, name: str) -> float:
    """Passes over the training set of a task: the config's, or those of the paper (appendix B)."""
    kind = config.task.kind    # a text task may be called stsb
    published = 10.0 if kind == "glue" and name in ("rte", "stsb") else 2.0 if kind == "squad" else 3.0
    return config.optimizer.epochs or published


# --- Variants of the files in configs/finetune --------------------------------------------------

def base(c: ml_collections.ConfigDict) -> None:
    """Rates of the paper for ELECTRA-Base."""
    c.optimizer.learning_rate = 1e-4


def large(c: ml_collections.ConfigDict) -> None:
    """Rates of the paper for ELECTRA-Large."""
    c.optimizer.learning_rate, c.optimizer.layer_decay = 5e-5, 0.9


def reference(c: ml_collections.ConfigDict) -> None:
    """The original's code where it differs from the paper (facts b.15)."""
    c.optimizer.update({"learning_rate": min(1e-4, c.optimizer.learning_rate), "layer_decay_rule": "original",
                        "weight_decay": 0.01})
    c.run.select = "last"


def paper(c: ml_collections.ConfigDict) -> None:
    """The paper where it differs from the original's code."""
    c.optimizer.update({"layer_decay_rule": "paper", "weight_decay": 0.0})
    c.run.select = "last"


def apply_variants(c: ml_collections.ConfigDict, names: str, variants: dict | None = None) -> ml_collections.ConfigDict:
    """As in pretraining, with the variants `base`, `large`, `reference` and `paper` known to every config."""
    known = {"base": base, "large": large, "reference": reference, "paper": paper}
    return pretraining.apply_variants(c, names, known | (variants or {}))


_CHOICES = {
    "task.kind": ("glue", "squad", "tagging", "text"), "task.label_type": ("auto", "class", "score"),
    "task.version": ("v1.1", "v2.0"), "task.scheme": ("auto", "bio", "iob1", "bioes", "plain"),
    "task.train_scheme": ("bio", "bioes", "plain"),
    "model.head": ("electra", "huggingface"), "model.qa_head": ("joint", "plain"),
    "model.dtype": ("float32", "bfloat16"), "model.attention": ("xla", "cudnn"),
    "model.remat": ("none", "dots", "full"), "optimizer.layer_decay_rule": ("original", "paper"),
    "run.select": ("best", "last"),
}
_RANGES = {
    "task.doc_stride": (1, math.inf), "task.max_query": (1, math.inf), "task.max_answer": (1, math.inf),
    "task.n_best": (1, 1000),
    "model.hidden_dropout": (0, 0.99), "model.attention_dropout": (0, 0.99), "model.head_dropout": (0, 0.99),
    "data.seq_len": (8, 65536), "data.batch_size": (1, math.inf), "data.eval_batch_size": (1, math.inf),
    "data.bucket": (1, 65536), "data.pool_batches": (1, math.inf),
    "optimizer.learning_rate": (0, math.inf), "optimizer.layer_decay": (1e-3, 1), "optimizer.epochs": (0, 10_000),
    "optimizer.warmup": (0, 1), "optimizer.weight_decay": (0, math.inf), "optimizer.beta1": (0, 0.999999),
    "optimizer.beta2": (0, 0.99999999), "optimizer.epsilon": (0, 1), "optimizer.clip_norm": (0, math.inf),
    "mesh.data": (-1, math.inf), "mesh.fsdp": (-1, math.inf), "mesh.tensor": (-1, math.inf),
    "run.seeds": (1, 10_000), "run.seed": (0, 2**31 - 1), "run.log_every_steps": (1, math.inf),
    "run.evals_per_epoch": (1, 10_000), "run.patience": (0, math.inf), "run.max_steps": (0, math.inf),
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first field whose value cannot work, alone or with the others."""
    if "task" not in config:
        raise UserError("--config: this is no fine-tuning config (has no section task): give one of configs/finetune/.")
    pretraining.check_fields(config, _CHOICES, _RANGES)
    if not config.init_from:
        raise UserError("init_from is empty: give a workdir, an exported or a Hugging Face folder, "
                        "--config.init_from=runs/small.")
    if config.task.kind == "glue":
        for name in filter(None, map(str.strip, (config.run.tasks or config.task.name).split(","))):
            if name not in (*GLUE, *["all"] * bool(config.run.tasks)):
                raise UserError(f"task {name!r} is not one of {', '.join(GLUE)}: mend task.name or run.tasks.")
            if name == "all" and config.run.tasks.strip(" ,") != "all":
                raise UserError(f"run.tasks={config.run.tasks}: all stands alone: name the tasks, or give only all.")
    elif not re.fullmatch(r"\w[\w.-]*", config.task.name) or len(config.task.name.encode()) > 200:    # of 255 bytes
        raise UserError(f"task.name={config.task.name!r} cannot name a folder: give letters, digits, - and _, 200 "
                        "bytes at most.")
    elif config.run.tasks:
        raise UserError(f"run.tasks={config.run.tasks!r} is for GLUE, but task.kind={config.task.kind}: set it to ''.")
    if config.model.attention == "cudnn" and (config.model.attention_dropout or config.model.dtype != "bfloat16"):
        raise UserError(f"model.attention=cudnn needs model.dtype=bfloat16 (is {config.model.dtype}) and "
                        f"model.attention_dropout=0 (is {config.model.attention_dropout}).")
