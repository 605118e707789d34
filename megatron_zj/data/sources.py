"""From a data configuration to the units of one split: raw files in memory, or prepared folders."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_zj.config.data import ChatConfig, CorpusConfig, DataConfig, HeldOutConfig, PreferenceConfig
from megatron_zj.data.corpus import CorpusUnits, DocumentTokens, SampleSet, Split, check_ids, split_bounds
from megatron_zj.data.dialogue import DialogueUnits, StoredUnits
from megatron_zj.data.errors import DataError
from megatron_zj.data.inputs import Conversion, RowsConfig, load_units
from megatron_zj.data.order import KeyedPermutation
from megatron_zj.data.preference import PreferenceUnits
from megatron_zj.data.prepared import checksum, is_prepared, open_prepared, verify
from megatron_zj.data.prompts import PromptUnits
from megatron_zj.data.rows import Counts
from megatron_zj.data.store import ShardStore, UnitStore
from megatron_zj.data.tokenizer import Tokenizer

_SPLIT_SEED = 20260  # fixed: which records are held out must not change with the run's seed
_log = logging.getLogger(__name__)


def verify_inputs(
    config: DataConfig, tokenizer: Tokenizer, rank: int = 0, world_size: int = 1, *, progress: bool = False
) -> None:
    """Check this rank's share of the files that streams of ``config`` map: a prepared folder's checksums (see
    ``verify``), and the ids of indexed datasets of other programs, which have none; one line names the latter.

    Raises DataError on this rank alone for damage, on all ranks for what ``open_prepared`` refuses.
    """
    held_out = config.validation_files if isinstance(config, HeldOutConfig) else ()
    paths = [Path(name) for name in dict.fromkeys((*config.files, *held_out))]
    folders = [path for path in paths if is_prepared(path)]
    for folder in folders:
        open_prepared(folder, [config.kind], tokenizer)  # the wrong folder is told at once
    verify(folders, rank, world_size, progress=progress)
    foreign = [path for path in paths if path not in folders] if isinstance(config, CorpusConfig) else []
    if not foreign:
        return
    if rank == 0:
        _log.info(
            "no manifest of zj prepare: %s; checked are sizes, indexes and that every id is below %d, not the contents "
            "nor which tokenizer wrote them",
            ", ".join(map(str, foreign)),
            tokenizer.vocab_size,
        )
    prefixes = [prefix for path in foreign for prefix in _indexed(path)]
    check_ids(prefixes, tokenizer.vocab_size, rank, world_size, progress=progress)


def row_units(config: RowsConfig, tokenizer: Tokenizer, split: Split, *, progress: bool) -> StoredUnits | None:
    """Units of dialogues, rankings or prompts; None when there is no validation data."""
    validation_files = config.validation_files if isinstance(config, HeldOutConfig) else ()
    fraction = config.validation_fraction if isinstance(config, HeldOutConfig) and not validation_files else 0.0
    if split == "validation" and not validation_files and fraction == 0:
        return None
    files = validation_files if split == "validation" and validation_files else config.files
    store = _store(files, config, tokenizer, progress)
    chosen: Sequence[int] = range(store.num_units)
    if fraction > 0:
        held_out = _held_out(store, fraction)
        chosen = [unit for unit in chosen if (store.record(unit) in held_out) == (split == "validation")]
        if not chosen:
            raise DataError(f"data.validation_fraction={fraction} leaves no record for {split}\n  -> change it")
    if isinstance(config, ChatConfig):
        return DialogueUnits(store, chosen)
    return PreferenceUnits(store, chosen) if isinstance(config, PreferenceConfig) else PromptUnits(store, chosen)


def _store(files: Sequence[str], config: RowsConfig, tokenizer: Tokenizer, progress: bool) -> UnitStore:
    prepared = [name for name in files if is_prepared(Path(name))]
    if not prepared:
        store, counts = load_units(files, Conversion.of(config), tokenizer, progress=progress)
        report(counts, files)
        return store
    if len(prepared) < len(files):
        raise DataError("data.files mixes prepared folders and raw files\n  -> prepare the raw files too")
    prefixes: list[Path] = []
    digest = hashlib.sha256()
    for name in files:
        manifest, shards = open_prepared(Path(name), [config.kind], tokenizer)
        prefixes += shards
        digest.update(manifest.job.encode())
        wanted = Conversion.of(config)
        for key in ("template", "max_length", "overlong"):
            if manifest.conversion[key] != getattr(wanted, key):
                raise DataError(
                    f"{name} was prepared with data.{key}={manifest.conversion[key]}, not {getattr(wanted, key)}\n"
                    f"  -> set data.{key}={manifest.conversion[key]}, or prepare the data again"
                )
    return ShardStore(prefixes, digest.hexdigest())


def _held_out(store: UnitStore, fraction: float) -> set[int]:
    """The records of the validation split: the same for every seed; all units of a record fall on one side."""
    records = sorted({store.record(unit) for unit in range(store.num_units)})
    order = KeyedPermutation(len(records), _SPLIT_SEED, "validation") if records else None
    count = round(len(records) * fraction)
    return {records[order(place)] for place in range(count)} if order else set()


def corpus_units(config: CorpusConfig, tokenizer: Tokenizer, seed: int, split: Split) -> CorpusUnits | None:
    """Samples of prepared text; None when there is no validation data."""
    fraction = config.validation_fraction
    if split == "validation" and fraction == 0:
        return None
    weights = config.weights
    if weights is not None and (len(weights) != len(config.files) or sum(weights) == 0):
        raise DataError(
            f"data.weights must be one number >= 0 a file, not all 0: {len(weights)} weights, {len(config.files)} files"
        )
    sets = []
    digest = hashlib.sha256()
    for name in config.files:
        prefixes, identity = _prefixes(Path(name), tokenizer)
        digest.update(identity.encode())
        tokens = DocumentTokens(prefixes, tokenizer.vocab_size)
        first, last = split_bounds(tokens, fraction, split)
        samples = SampleSet(tokens, first, last, config.sequence_length)
        if split == "train" and samples.num_samples == 0:
            raise DataError(f"{name} has no text for training\n  -> remove it, or lower data.validation_fraction")
        sets.append(samples)
    if sum(samples.num_samples for samples in sets) == 0:
        raise DataError(
            f"data.validation_fraction={fraction} gives no validation document\n  -> raise it, or set it to 0"
        )
    return CorpusUnits(
        sets,
        weights if split == "train" else None,
        seed=seed if split == "train" else None,
        respect_documents=config.respect_documents,
        checksum=digest.hexdigest(),
    )


def _prefixes(path: Path, tokenizer: Tokenizer) -> tuple[list[Path], str]:
    """The indexed datasets behind one entry of data.files, and a name for their content."""
    if is_prepared(path):
        manifest, prefixes = open_prepared(path, ["corpus"], tokenizer)
        if not prefixes:
            raise DataError(f"{path} holds no document\n  -> prepare it from other files")
        return prefixes, manifest.job
    prefixes = _indexed(path)
    return prefixes, "".join(checksum(Path(f"{prefix}.idx")) for prefix in prefixes)


def _indexed(path: Path) -> list[Path]:
    """The prefixes of indexed datasets without a manifest: those in a folder, or the one named."""
    if path.is_dir():
        found = sorted(item.with_suffix("") for item in path.glob("*.idx"))
    else:
        found = [path] if Path(f"{path}.idx").is_file() else []
    if not found:
        raise DataError(
            f"{path} is neither a prepared folder nor the prefix of a .bin and .idx file\n"
            f"  -> prepare it: zj prepare data.files=[{path}] tokenizer.path=... out=DIR"
        )
    return found


def report(counts: Counts, files: Sequence[str]) -> None:
    """One line on what was read; a warning with examples where records were left out."""
    _log.info("%d records, %d units, %d tokens from %s", counts.records, counts.units, counts.tokens, ", ".join(files))
    if counts.bad or counts.too_long or counts.shortened:
        _log.warning(
            "left out: %d bad, %d too long; shortened: %d (of %d records)%s",
            counts.bad,
            counts.too_long,
            counts.shortened,
            counts.records,
            "".join(f"\n  {complaint}" for complaint in counts.first_bad),
        )
