"""Raw files to a prepared folder: over several processes, interruptible, re-runnable.

The records are cut into shards in input order, by a rule that depends on the input alone.  A shard counts once its
sidecar ``.json`` stands beside it, and is skipped by the next run of the same preparation; the manifest, written last,
makes the folder usable.  So nothing half-written can be taken for whole, and an interrupted run loses at most the
shards that were being written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from megatron_zj.config.data import (
    ChatConfig,
    FormatName,
    OnBadRecord,
    PreferenceConfig,
    PromptsConfig,
    TokenizerConfig,
)
from megatron_zj.config.ranges import check_ranges
from megatron_zj.data.errors import DataError
from megatron_zj.data.formats.reading import Item
from megatron_zj.data.formats.registry import FORMATS, choose_format, raw_items
from megatron_zj.data.inputs import Conversion, encode_items
from megatron_zj.data.prepared import (
    JOB,
    MANIFEST,
    SHARDS,
    TOKENIZER,
    VERSION,
    PreparedManifest,
    ShardInfo,
    checksum,
    write_manifest,
)
from megatron_zj.data.raw import raw_files
from megatron_zj.data.rows import Counts
from megatron_zj.data.store import UNITS_SUFFIX, write_shard
from megatron_zj.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from megatron_zj.runtime.files import write_json

_SHARD_SUFFIXES = (".bin", ".idx", UNITS_SUFFIX)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Raw text for pre-training; what it becomes is read by ``CorpusConfig``."""

    kind: Literal["corpus"] = "corpus"
    files: tuple[str, ...] = ()  # raw files
    format: FormatName = "auto"  # auto: by each file's first record
    on_bad_record: OnBadRecord = "error"  # skip: leave out and count


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """One preparation."""

    out: Path  # folder to write; a run with other settings or inputs needs another
    data: TextConfig | ChatConfig | PreferenceConfig | PromptsConfig = TextConfig()  # the raw input
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)  # a copy goes into the folder
    workers: int = 1  # processes that tokenize
    shard_chars: int = 4_000_000  # characters of input a shard, about: what an interruption can lose, a worker

    def __post_init__(self) -> None:
        check_ranges(self, workers="[1, 1024]", shard_chars="[1, inf)")


@dataclass(frozen=True)
class _Task:
    """One shard to write; all that a worker process needs."""

    folder: Path
    name: str
    job: str
    path: Path
    form: str
    items: list[tuple[int, Item]]
    conversion: Conversion


def prepare(config: PrepareConfig, *, progress: bool = False) -> PreparedManifest:
    """Prepare, or finish a preparation that was interrupted.  Raises DataError; finished shards are kept."""
    if not config.data.files:
        raise DataError("data.files is empty\n  -> name at least one file")
    tokenizer = build_tokenizer(config.tokenizer)
    conversion = _conversion(config)
    conversion.encoder(tokenizer)  # refuses a wrong template now, not in every shard
    config = replace(config, data=replace(config.data, files=tuple(raw_files(config.data.files))))
    forms = {name: choose_format(Path(name), conversion.format).name for name in config.data.files}
    inputs = [_describe(Path(name), forms[name]) for name in config.data.files]
    identity = {
        "version": VERSION,
        "tokenizer": tokenizer.fingerprint(),
        "conversion": asdict(conversion),
        "inputs": [{key: entry[key] for key in ("sha256", "format")} for entry in inputs],
        "shard_chars": config.shard_chars,
    }
    job = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    _claim(config.out, job, tokenizer)
    shards = _write_shards(config, forms, conversion, job, progress)
    counts = Counts()
    for shard in shards:
        counts.add(Counts(**shard.counts))
    if counts.units == 0:
        none = f"none of the {counts.records} records of {', '.join(config.data.files)} could be used"
        raise DataError("\n".join([none, *counts.first_bad]))
    manifest = PreparedManifest(
        VERSION,
        job,
        conversion.kind,
        asdict(conversion),
        tokenizer.fingerprint(),
        tokenizer.vocab_size,
        inputs,
        asdict(counts),
        shards,
    )
    write_manifest(config.out, manifest)
    return manifest


def _conversion(config: PrepareConfig) -> Conversion:
    data = config.data
    if isinstance(data, TextConfig):
        return Conversion("corpus", data.format, "ziya", 2, "error", data.on_bad_record)
    if isinstance(data, ChatConfig | PreferenceConfig) and data.validation_files:
        raise DataError("data.validation_files is not prepared\n  -> prepare it by a second command, as data.files")
    return Conversion.of(data)


def _claim(out: Path, job: str, tokenizer: Tokenizer) -> None:
    """Make the folder this preparation's, with its tokenizer in it, or refuse it when it is another's.

    Another preparation that has no finished shard gives way: one that met a bad record, say, which is mended now.
    """
    before = _claimed(out)
    if not before and (any(out.glob("*.idx")) or (out / MANIFEST).is_file()):
        raise DataError(f"{out} already holds other data\n  -> choose another out=DIR")
    if before and before["job"] != job:
        if (out / MANIFEST).is_file() or any((out / SHARDS).glob("*.json")):
            raise DataError(
                f"{out} holds a preparation of other files or settings\n"
                "  -> choose another out=DIR, delete it, or repeat the command it was begun with"
            )
        for suffix in _SHARD_SUFFIXES:
            for half in (out / SHARDS).glob(f"*{suffix}"):
                half.unlink()
        with contextlib.suppress(ValueError, OSError):  # what is no tokenizer
            if load_tokenizer(out / TOKENIZER).fingerprint() == before.get("tokenizer"):
                shutil.rmtree(out / TOKENIZER)
    tokenizer.save(out / TOKENIZER)  # refuses one that is not this preparation's
    (out / SHARDS).mkdir(parents=True, exist_ok=True)
    write_json(out / JOB, {"job": job, "tokenizer": tokenizer.fingerprint()})


def _claimed(out: Path) -> dict[str, str]:
    """Whose the folder is: the preparation's identity as ``job``, its tokenizer's fingerprint; empty: nobody's."""
    path = out / JOB
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"job": found["job"], **found}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged\n  -> delete {out} or choose another out=DIR") from error


def _write_shards(
    config: PrepareConfig, forms: dict[str, str], conversion: Conversion, job: str, progress: bool
) -> list[ShardInfo]:
    """Every shard in order: those that are finished as they are, the others written now."""
    done: dict[str, ShardInfo] = {}
    running: set[Future[ShardInfo]] = set()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="prepare", unit=" records", disable=not progress))
        pool = None
        if config.workers > 1:
            # forkserver: a fork of this process would copy its threads' locks; the modules are imported once
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            pool = ProcessPoolExecutor(config.workers, mp_context=context, initializer=_start_worker)
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        for task in _tasks(config, forms, conversion, job):
            finished = _finished(task)
            if finished is None and pool is not None:
                running.add(pool.submit(_write_task, task))
                if len(running) >= 2 * config.workers:
                    running = _collect(running, done, bar)
                continue
            done[task.name] = finished or _write_task(task)
            bar.update(len(task.items))
        while running:
            running = _collect(running, done, bar)
    return [done[name] for name in sorted(done)]


def _collect(running: set[Future[ShardInfo]], done: dict[str, ShardInfo], bar: Any) -> set[Future[ShardInfo]]:
    """Wait for at least one shard."""
    ready, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in ready:
        try:
            shard = future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps for want of memory\n"
                "  -> run the same command again with fewer workers or a smaller shard_chars; finished shards are kept"
            ) from error
        done[shard.name] = shard
        bar.update(shard.counts["records"])
    return rest


def _tasks(config: PrepareConfig, forms: dict[str, str], conversion: Conversion, job: str) -> Iterator[_Task]:
    """The shards of the input, in order; a shard never spans two files."""
    record, shard = 0, 0
    for name in config.data.files:
        items: list[tuple[int, Item]] = []
        size = 0

        def task(items: list[tuple[int, Item]], shard: int, name: str = name) -> _Task:
            return _Task(config.out, f"{shard:06d}", job, Path(name), forms[name], items, conversion)

        for item in raw_items(Path(name), FORMATS[forms[name]]):
            items.append((record, item))
            size += _characters(item.value)
            record += 1
            if size >= config.shard_chars:
                yield task(items, shard)
                items, size, shard = [], 0, shard + 1
        if items:
            yield task(items, shard)
            shard += 1


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(item) for item in value.values())
    return sum(_characters(item) for item in value) if isinstance(value, list) else 1


def _finished(task: _Task) -> ShardInfo | None:
    """The shard, where an earlier run of the same preparation wrote it whole."""
    sidecar = task.folder / SHARDS / f"{task.name}.json"
    if not sidecar.is_file():
        return None
    try:
        shard = ShardInfo.of(json.loads(sidecar.read_text(encoding="utf-8")))
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    paths = {sidecar.with_name(f"{task.name}{suffix}"): info for suffix, info in shard.files.items()}
    whole = all(path.is_file() and path.stat().st_size == info["bytes"] for path, info in paths.items())
    return shard if whole and shard.job == task.job else None


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle (it lets the running shards finish); a killed parent takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _write_task(task: _Task) -> ShardInfo:
    """Encode and write one shard; runs in a worker process, or here."""
    tokenizer = load_tokenizer(task.folder / TOKENIZER)
    counts = Counts()
    encoder = task.conversion.encoder(tokenizer)
    found = encode_items(task.path, task.items, FORMATS[task.form], task.conversion, encoder, counts)
    units = [(unit, record) for unit, record, _ in found]
    if _claimed(task.folder).get("job") != task.job:
        raise DataError(f"another zj prepare has taken {task.folder} meanwhile\n  -> choose another out=DIR")
    folder = task.folder / SHARDS
    aside = folder / f".{task.name}.partial"
    files = {}
    try:
        if units:
            write_shard(aside, units, tokenizer.vocab_size)
            for suffix in _SHARD_SUFFIXES:
                path = Path(f"{aside}{suffix}")
                files[suffix] = {"bytes": path.stat().st_size, "sha256": checksum(path)}
                os.replace(path, folder / f"{task.name}{suffix}")
        shard = ShardInfo(task.name, task.job, asdict(counts), files)
        write_json(folder / f"{task.name}.json", asdict(shard))
    except OSError as error:
        raise DataError(
            f"writing {folder / task.name} failed: {error.strerror or error}\n"
            "  -> make room (or choose another out=DIR) and run the same command again; finished shards are kept"
        ) from error
    finally:
        for suffix in _SHARD_SUFFIXES:
            Path(f"{aside}{suffix}").unlink(missing_ok=True)
    return shard


def _describe(path: Path, form: str) -> dict[str, Any]:
    return {"path": str(path), "format": form, "bytes": path.stat().st_size, "sha256": checksum(path)}
