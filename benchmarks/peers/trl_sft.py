"""TRL's packed SFT as the other side of tools/bench_packing.py, run under a Python that has TRL.

Needs trl 1.12.0, accelerate 1.15.0, datasets 5.2.0 and transformers 5.x.

    python benchmarks/peers/trl_sft.py SETTINGS.json

Reads one line a request: an epoch of SFTTrainer.train over the dialogues.  One line of measurements answers it.  The
trainer runs as released, with what costs time and changes no result switched off: gradient checkpointing, bf16 on a
CPU, logging, saving.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

EPOCHS = 10_000  # the driver closes the input long before


class Turns(TrainerCallback):
    """Waits for a request before each epoch and answers it after."""

    def __init__(self, versions: dict[str, str], report: dict[str, Any]) -> None:
        self.versions, self.report, self.steps = versions, report, 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Ready."""
        _say({"ready": True, "versions": self.versions, **self.report})

    def on_epoch_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Wait, then start the clocks."""
        if not sys.stdin.readline():
            sys.exit(0)
        self.steps = state.global_step
        self._wall, self._busy = time.perf_counter(), time.process_time()

    def on_epoch_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Stop them."""
        seconds, processor = time.perf_counter() - self._wall, time.process_time() - self._busy
        _say({"seconds": seconds, "processor": processor, "steps": state.global_step - self.steps})


def _say(message: dict[str, Any]) -> None:
    print("PEER " + json.dumps(message), flush=True)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    model = WordLevel({str(index): index for index in range(vocabulary)}, unk_token="3")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="1", pad_token="0")


def _trainer(settings: dict[str, Any]) -> SFTTrainer:
    """``packing``: bfd, bfd_split, wrapped, padding_free (whole dialogues end to end), padded."""
    packing, rows, length = settings["packing"], settings["rows"], settings["length"]
    packs = packing in ("bfd", "bfd_split", "wrapped")
    slots = rows * (length if packs else settings["mean_length"])
    config = SFTConfig(
        output_dir=settings["folder"],
        packing=packs,
        **({"packing_strategy": packing} if packs else {}),
        padding_free=packing == "padding_free",
        max_length=None if packing == "padding_free" else length,
        loss_type=settings["loss_type"],
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=max(1, round(settings["tokens_a_step"] / slots)),
        num_train_epochs=EPOCHS,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.1,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    model = LlamaForCausalLM(LlamaConfig(**settings["llama"], attn_implementation=settings["attention"]))
    data = Dataset.from_dict({name: settings[name] for name in ("input_ids", "labels")})
    tokenizer = _tokenizer(settings["llama"]["vocab_size"])
    return SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)


def _contaminates(trainer: SFTTrainer) -> bool:
    """Whether a token of a pack's second dialogue sees the first: its logits change with another first token."""
    batch = next(iter(trainer.get_train_dataloader()))
    batch.pop("labels")
    ids, model = batch.pop("input_ids"), trainer.model.eval()
    # with positions the second dialogue begins at their second 0; without, nothing marks a boundary
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0] if "position_ids" in batch else torch.tensor([0])
    place = int(starts[1]) if len(starts) > 1 else -1
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % model.config.vocab_size
    with torch.no_grad():
        seen = [model(input_ids=tokens, **batch).logits[0, place] for tokens in (ids, other)]
    model.train()
    return not torch.equal(*seen)


def main() -> None:
    """Serve epochs until the input ends."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    transformers.utils.logging.set_verbosity_error()
    trainer = _trainer(settings)
    report = {
        "packs": len(trainer.train_dataset),
        "tokens": sum(len(ids) for ids in trainer.train_dataset["input_ids"]),
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
    }
    report["dialogues_see_each_other"] = settings["packing"] != "padded" and _contaminates(trainer)
    versions = {name: metadata.version(name) for name in ("trl", "transformers", "accelerate", "datasets", "torch")}
    trainer.add_callback(Turns(versions, report))
    trainer.train()


if __name__ == "__main__":
    main()
