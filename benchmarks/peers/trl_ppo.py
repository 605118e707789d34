"""TRL's PPO as the other side of tools/bench_ppo.py, run under a Python that has TRL.

Needs trl 1.12.0 (the last release with PPO), accelerate 1.15.0, datasets 5.2.0 and transformers 5.x.

    python benchmarks/peers/trl_ppo.py SETTINGS.json

Reads one request a line: {"lengths": [...] or null}, the response lengths to sample, null: all at full length.  Each
request is one iteration of PPOTrainer.train, and one line of measurements answers it.  The trainer runs as released;
what is added are clocks around its phases, and, so that both sides have the same response lengths, a logits processor
that puts the stop token where the request says (about 3 ms of an iteration's second, counted in "forcing").
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
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

ITERATIONS = 10_000  # the driver closes the input long before


class Clocks:
    """Wall and processor seconds since ``start``, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """Begin an iteration."""
        self.seconds, self.processor = {}, {}
        self._wall, self._busy = time.perf_counter(), time.process_time()

    def end(self, phase: str) -> None:
        """What passed since the last end belongs to ``phase``."""
        wall, busy = time.perf_counter(), time.process_time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + wall - self._wall
        self.processor[phase] = self.processor.get(phase, 0.0) + busy - self._busy
        self._wall, self._busy = wall, busy


class StopAt(transformers.LogitsProcessor):
    """The stop token after ``lengths`` tokens and not before; ``lengths`` None: never."""

    def __init__(self, stop: int, prompt_length: int) -> None:
        self.stop, self.prompt_length, self.lengths = stop, prompt_length, None
        self.seconds = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        scores[:, self.stop] = float("-inf")
        if self.lengths is not None:
            ends = torch.tensor(self.lengths) == input_ids.shape[1] - self.prompt_length + 1
            if bool(ends.any()):
                scores[ends] = float("-inf")
                scores[ends, self.stop] = 0.0
        self.seconds += time.perf_counter() - begin
        return scores


class Turns(transformers.TrainerCallback):
    """Waits for a request before each iteration and answers it after."""

    def __init__(self, clocks: Clocks, stop_at: StopAt, versions: dict[str, str]) -> None:
        self.clocks, self.stop_at, self.versions = clocks, stop_at, versions

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Ready."""
        _say({"ready": True, "versions": self.versions})
        self._next()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """An iteration is over."""
        self.clocks.end("learn")
        _say(
            {
                "seconds": self.clocks.seconds,
                "processor": self.clocks.processor,
                "forcing": self.stop_at.seconds,
                "peak_mib": _peak_mib(),
            }
        )
        self._next()

    def _next(self) -> None:
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        self.stop_at.lengths, self.stop_at.seconds = json.loads(line)["lengths"], 0.0
        self.clocks.start()


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write("PEER " + json.dumps(message) + "\n")
    sys.stdout.flush()


def _peak_mib() -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return float(lines["VmHWM"].split()[0]) / 1024


def _tokenizer(vocabulary: int, stop: int, pad: int) -> PreTrainedTokenizerFast:
    model = WordLevel({str(index): index for index in range(vocabulary)}, unk_token="3")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token=str(stop), pad_token=str(pad))


def _models(settings: dict[str, Any]) -> dict[str, Any]:
    """The policy and the reference from the given weights, value and reward model on the same trunk."""
    config = LlamaConfig(**settings["llama"], num_labels=1, attn_implementation="sdpa")
    weights = load_file(settings["weights"])
    found: dict[str, Any] = {}
    for role in ("model", "ref_model"):
        found[role] = LlamaForCausalLM(config)
        found[role].load_state_dict(weights)
        found[role].generation_config.pad_token_id = settings["pad"]
    for role in ("value_model", "reward_model"):
        found[role] = LlamaForSequenceClassification(config)
        found[role].load_state_dict({name: w for name, w in weights.items() if name != "lm_head.weight"}, strict=False)
    return found


def _trainer(settings: dict[str, Any], stop_at: StopAt) -> PPOTrainer:
    rows, stop = settings["rows"], settings["stop"]
    config = PPOConfig(
        output_dir=settings["folder"],
        # with gradient accumulation TRL makes one optimizer step of all minibatches; so they come as one device batch
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_mini_batches=settings["minibatches"],
        num_ppo_epochs=1,
        total_episodes=rows * ITERATIONS,
        response_length=settings["new_tokens"],
        stop_token_id=stop,
        temperature=settings["temperature"],
        local_rollout_forward_batch_size=rows,
        learning_rate=settings["lr"],
        num_sample_generations=0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=ITERATIONS,
    )
    models = _models(settings)
    generate = models["model"].generate

    def generate_until(**kwargs: Any) -> Any:
        return generate(logits_processor=[stop_at], **kwargs)

    models["model"].generate = generate_until
    prompts = Dataset.from_dict({"input_ids": settings["prompts"]})
    tokenizer = _tokenizer(settings["llama"]["vocab_size"], stop, settings["pad"])
    return PPOTrainer(args=config, processing_class=tokenizer, train_dataset=prompts, eval_dataset=prompts, **models)


def main() -> None:
    """Serve iterations until the input ends."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    transformers.utils.logging.set_verbosity_error()
    clocks, stop_at = Clocks(), StopAt(settings["stop"], len(settings["prompts"][0]))
    trainer = _trainer(settings, stop_at)
    generation, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

    def timed_generation(*args: Any, **kwargs: Any) -> Any:
        found = generation(*args, **kwargs)
        clocks.end("generate")
        return found

    def timed_whiten(*args: Any, **kwargs: Any) -> Any:  # the last thing before learning
        found = whiten(*args, **kwargs)
        clocks.end("score")
        return found

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = timed_generation, timed_whiten
    versions = {name: metadata.version(name) for name in ("trl", "transformers", "accelerate", "datasets", "torch")}
    trainer.add_callback(Turns(clocks, stop_at, versions))
    trainer.train()


if __name__ == "__main__":
    main()
