"""SST-2 by transformers' Trainer, fine-tuning and evaluation: the peer of `electra_jax.tools.bench --what=finetune`.

  python -m electra_jax.tools.bench --what=finetune --rounds=3 --steps=200 --config=configs/finetune/glue.py:sst2 \
      --config.init_from=X --config.task.data_dir=glue \
      --against='python benchmarks/hf_trainer.py --data_dir=glue --vocab=vocab.txt --sampling=group_by_length'

ELECTRA-Small's shape with random weights, float32, dropout 0.1, AdamW, batches padded to their longest row. Prints
two lines of JSON with the fields of that benchmark; tokens are counted without padding. X is any workdir of
configs/small.py with that vocabulary. Needs torch, transformers (4.57 or later) and accelerate.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import BertWordPieceTokenizer


def read(file: Path, tokenizer, max_length: int) -> list[dict]:
    """The rows of an official SST-2 file as the model's inputs."""
    with open(file, encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    encoded = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=max_length)
    return [{"input_ids": encoded["input_ids"][i], "attention_mask": encoded["attention_mask"][i],
             "token_type_ids": encoded["token_type_ids"][i], "labels": int(row["label"])} for i, row in enumerate(rows)]


class Collator(transformers.DataCollatorWithPadding):
    """Pads to the longest row of a batch, and counts (tokens, tokens and padding) of each."""

    counts: list[tuple[int, int]]

    def __call__(self, features):
        batch = super().__call__(features)
        self.counts.append((int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
        return batch


class Clock(transformers.TrainerCallback):
    """Notes when each step ended."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, *arguments, **more):
        self.times.append(time.perf_counter())


def main() -> None:
    """Trains for `--warmup` and `--steps` steps, evaluates twice, and prints what the second parts took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder with train.tsv and dev.tsv, or with SST-2/ in it")
    parser.add_argument("--vocab", required=True, help="uncased vocab.txt of BERT's")
    parser.add_argument("--output", default="/tmp/hf_trainer", help="folder that Trainer wants; nothing is saved")
    parser.add_argument("--sampling", choices=("random", "group_by_length"), default="random")
    parser.add_argument("--steps", type=int, default=200, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10, help="steps before")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--eval_batch_size", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    transformers.set_seed(0)
    transformers.logging.set_verbosity_error()

    pieces = BertWordPieceTokenizer(o.vocab, lowercase=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=o.max_length, model_input_names=[
            "input_ids", "token_type_ids", "attention_mask"])
    folder = Path(o.data_dir) / "SST-2" if (Path(o.data_dir) / "SST-2").is_dir() else Path(o.data_dir)
    train, dev = (read(folder / f"{split}.tsv", tokenizer, o.max_length) for split in ("train", "dev"))
    model = transformers.ElectraForSequenceClassification(transformers.ElectraConfig(
        vocab_size=len(tokenizer), embedding_size=128, hidden_size=256, num_hidden_layers=12, num_attention_heads=4,
        intermediate_size=1024, num_labels=2, classifier_dropout=0.1))
    known = transformers.TrainingArguments.__dataclass_fields__    # transformers 5 calls it otherwise
    sampling = ({"train_sampling_strategy": o.sampling} if "train_sampling_strategy" in known else
                {"group_by_length": o.sampling == "group_by_length"})
    arguments = transformers.TrainingArguments(
        output_dir=o.output, max_steps=o.warmup + o.steps, per_device_train_batch_size=o.batch_size,
        per_device_eval_batch_size=o.eval_batch_size, learning_rate=1e-4, weight_decay=0.01, use_cpu=True,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, **sampling)
    clock, collator = Clock(), Collator(tokenizer)
    collator.counts = []
    trainer = transformers.Trainer(
        model, arguments, data_collator=collator, train_dataset=train, eval_dataset=dev, callbacks=[clock],
        compute_metrics=lambda p: {"accuracy": 100 * float((np.argmax(p.predictions, -1) == p.label_ids).mean())})
    trainer.remove_callback(transformers.PrinterCallback)
    about = {"task": "sst2", "peer": f"transformers {transformers.__version__}", "torch": torch.__version__,
             "dtype": "float32", "sampling": o.sampling, "threads": o.threads}

    start = time.perf_counter()
    result = trainer.train()
    started, ended = clock.times[o.warmup - 1] if o.warmup else start, clock.times[-1]
    tokens, room = np.sum(collator.counts[o.warmup:o.warmup + o.steps], 0).tolist()
    print(json.dumps({
        "what": "finetune", **about, "batch_size": o.batch_size, "steps": o.steps,
        "examples_per_s": round(o.batch_size * o.steps / (ended - started), 2),
        "tokens_per_s": round(tokens / (ended - started)), "step_ms": round(1e3 * (ended - started) / o.steps, 2),
        "padding": round(1 - tokens / room, 4), "loss": round(result.training_loss, 4)}), flush=True)

    for _ in range(2):    # once to warm up
        start = time.perf_counter()
        scores = trainer.evaluate()
        seconds = time.perf_counter() - start
    print(json.dumps({
        "what": "evaluate", **about, "batch_size": o.eval_batch_size, "examples": len(dev),
        "examples_per_s": round(len(dev) / seconds, 2),
        "tokens_per_s": round(sum(len(row["input_ids"]) for row in dev) / seconds), "seconds": round(seconds, 3),
        "accuracy": scores["eval_accuracy"]}), flush=True)


if __name__ == "__main__":
    main()
