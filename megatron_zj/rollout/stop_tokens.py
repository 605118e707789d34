"""Which ids end a row: eos, and the tokens that ``stop_tokens`` names."""

from __future__ import annotations

from megatron_zj.config.loader import ConfigError
from megatron_zj.config.sampling import SamplingConfig
from megatron_zj.data.tokenizer import Tokenizer


def stop_ids(sampling: SamplingConfig, tokenizer: Tokenizer, key: str = "sampling") -> frozenset[int]:
    """Ids of eos and of every stop token: a special token, an entry of the vocabulary as it is spelled there, or a
    text that is one token.

    ``key``: where ``sampling`` stands in the configuration.  Raises ConfigError, a line for each that is no token.
    """
    entries: dict[str, int] = {}
    if any(token not in tokenizer.specials for token in sampling.stop_tokens):
        entries = {tokenizer.piece(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    found, wrong = {tokenizer.eos_id}, []
    for token in sampling.stop_tokens:
        known = tokenizer.specials.get(token, entries.get(token))
        ids = tokenizer.encode(token) if known is None else [known]
        if known is not None or (len(ids) == 1 and tokenizer.decode(ids) == token):  # and not the unknown token
            found.add(ids[0])
            continue
        pieces = " ".join(tokenizer.piece(token_id) for token_id in ids)
        wrong.append(
            f"{key}.stop_tokens: {token!r} is no token of the tokenizer, it is {len(ids)} ({pieces}); give it as "
            f"{key}.stop_strings, or name a special token ({', '.join(tokenizer.specials) or 'there is none'})"
        )
    if wrong:
        raise ConfigError(wrong)
    return frozenset(found)
