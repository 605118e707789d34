"""How answers are drawn from a model: in rollouts, generation and chat."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_zj.config.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How responses are drawn from the policy."""

    max_new_tokens: int = 64  # tokens of a response, eos included
    min_new_tokens: int = 0  # eos and stop tokens are forbidden before this many tokens
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # nucleus: likeliest tokens up to this probability; 1: off
    repetition_penalty: float = 1.0  # CTRL (Keskar et al. 2019); 1: off
    max_batch_rows: int = 64  # rows decoded at once, a data-parallel rank
    stop_tokens: tuple[str, ...] = ()  # tokens that end a row as eos does: special tokens, or entries of the vocabulary
    stop_strings: tuple[str, ...] = ()  # a row ends once its text holds one of these, which stays in it
    cuda_graphs: bool = True  # replay decoding steps as CUDA graphs where device and layout allow it

    @property
    def draws_from_the_model(self) -> bool:
        """Whether tokens come from softmax(logits / temperature) over the whole vocabulary, and nothing cuts it."""
        cut = (self.top_k, self.top_p, self.repetition_penalty, self.min_new_tokens) != (0, 1.0, 1.0, 0)
        return self.temperature > 0 and not cut

    def __post_init__(self) -> None:
        check_ranges(
            self,
            max_new_tokens="[1, inf)",
            min_new_tokens="[0, inf)",
            temperature="[0, inf)",
            top_k="[0, inf)",
            top_p="(0, 1]",
            repetition_penalty="(0, inf)",
            max_batch_rows="[1, inf)",
        )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}; lower it"
            )
        if not all(self.stop_tokens):
            raise ValueError("stop_tokens must be names of tokens, got an empty one; leave it out")
        if any(not string or "\ufffd" in string for string in self.stop_strings):
            raise ValueError(
                f"stop_strings must be texts of at least one whole character, got {list(self.stop_strings)}; "
                "U+FFFD is what half a character decodes to"
            )
