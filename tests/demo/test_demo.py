"""The demo's files: loadable, repeatable, whole or absent; and the warm start learns."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from dapo_async.config.settings import Config
from dapo_async.demo import demo, sums
from dapo_async.demo.demo import make_model, make_tokenizer, prepare_demo
from dapo_async.errors import ConfigError

TINY = {"train_prompts": 60, "heldout_prompts": 20, "warm_start_iterations": 4, "warm_start_batch": 8, "threads": 1}


def config(cache: Path, seed: int = 0, **changes: Any) -> Config:
    table = {
        "run": {"seed": seed},
        "demo": {"task": "sums", "cache": str(cache), "hidden_size": 32, "layers": 1, **TINY, **changes},
    }
    return msgspec.convert(table, Config)


def silent(done: int, total: int, text: str) -> None:
    pass


def interrupt(done: int, total: int, text: str) -> None:
    raise KeyboardInterrupt


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def built(resolved: Config) -> Path:
    return Path(resolved.model.path).parent


def prompts(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_builds_data_and_a_model_that_transformers_loads(tmp_path: Path) -> None:
    resolved, seconds = prepare_demo(config(tmp_path), silent)
    assert resolved.demo.task == ""
    assert seconds > 0
    train, heldout = prompts(resolved.data.train), prompts(resolved.data.heldout)
    assert (len(train), len(heldout)) == (60, 20)
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in heldout}
    assert all(p["answer"] == str(sums.running_totals(p["prompt"])[-1]) for p in train + heldout)
    tokenizer = AutoTokenizer.from_pretrained(resolved.model.path)
    model = AutoModelForCausalLM.from_pretrained(resolved.model.path)
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    answers = model.generate(**tokenizer(["3+5=", "3+5-2="], padding=True, return_tensors="pt"), max_new_tokens=3)
    assert answers.shape[0] == 2


def test_the_default_model_has_about_600_thousand_parameters(tmp_path: Path) -> None:
    model = make_model(make_tokenizer(), config(tmp_path, hidden_size=128, layers=3).demo)
    assert 500_000 < sum(p.numel() for p in model.parameters()) < 700_000


def test_tokenizer_gives_one_token_per_character_and_the_text_back(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "3+5-2+9=3+5=8;8-2=6;6+9=15;#15"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("1 x")["input_ids"]) == ["1", "<unk>", "<unk>"]
    assert tokenizer.chat_template is None


def test_nothing_held_out_is_in_the_warm_start(tmp_path: Path) -> None:
    settings = config(tmp_path, min_terms=2, max_terms=2).demo
    tokenizer = make_tokenizer()
    heldout = frozenset(sums.chain_at(rank, 2) for rank in range(0, 126, 2))
    examples = demo.warm_start_examples(tokenizer, settings, heldout, random.Random(0))
    seen = [next(examples) for _ in range(1000)]
    chains = {tokenizer.decode(example.prompt_ids) for example in seen}
    assert chains == {sums.chain_at(rank, 2) for rank in range(1, 126, 2)}
    texts = [(tokenizer.decode(e.prompt_ids), tokenizer.decode(e.answer_ids)) for e in seen]
    forms = {sums.terse_answer: "#", sums.worked_answer: "123456789"}
    for form, first in forms.items():
        assert all(answer == form(chain) + "<eos>" for chain, answer in texts if answer[0] in first)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_choice_weights_make_up_for_the_shares_shown(tmp_path: Path, share: float) -> None:
    tokenizer = make_tokenizer()
    terse_first = tokenizer.convert_tokens_to_ids("#")
    settings = config(tmp_path, terse_share=share).demo
    examples = demo.warm_start_examples(tokenizer, settings, frozenset(), random.Random(0))
    seen = [next(examples) for _ in range(4000)]
    terse = sum(e.choice_weight for e in seen if e.answer_ids[0] == terse_first)
    assert sum(e.choice_weight for e in seen) / 4000 == pytest.approx(1, abs=0.1)
    assert terse / 4000 == pytest.approx(share, abs=0.07)
    assert sum(e.answer_ids[0] == terse_first for e in seen) / 4000 == pytest.approx(min(share, 0.15), abs=0.02)


def test_a_second_call_finds_the_files_and_trains_nothing(tmp_path: Path) -> None:
    first, _ = prepare_demo(config(tmp_path), silent)
    before = digests(built(first))
    second, seconds = prepare_demo(config(tmp_path), lambda done, total, text: pytest.fail("trained again"))
    assert second == first
    assert seconds == 0.0
    assert digests(built(second)) == before


def test_a_build_is_repeated_bit_for_bit_and_depends_on_the_seed(tmp_path: Path) -> None:
    one = digests(built(prepare_demo(config(tmp_path / "a"), silent)[0]))
    torch.rand(1)  # the caller's generator must not matter
    other = digests(built(prepare_demo(config(tmp_path / "b"), silent)[0]))
    assert one == other
    seeded = digests(built(prepare_demo(config(tmp_path / "a", seed=1), silent)[0]))
    changed = {name for name in one if one[name] != seeded[name]}
    assert changed == {"train.jsonl", "heldout.jsonl", "model/model.safetensors"}


def test_any_setting_of_the_demo_makes_another_folder_but_the_cache_does_not(tmp_path: Path) -> None:
    key = demo.demo_key(config(tmp_path))
    assert demo.demo_key(config(tmp_path / "elsewhere")) == key
    assert demo.demo_key(config(tmp_path, terse_share=0.5)) != key
    assert demo.demo_key(config(tmp_path, seed=1)) != key


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare_demo(config(tmp_path / "cache"), interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_of_two_builders_at_once_the_first_to_end_wins_and_both_are_served(tmp_path: Path) -> None:
    winners: list[Config] = []

    def while_another_builds(done: int, total: int, text: str) -> None:
        if not winners:
            winners.append(prepare_demo(config(tmp_path), silent)[0])

    late, _ = prepare_demo(config(tmp_path), while_another_builds)
    assert winners == [late]
    assert list(tmp_path.iterdir()) == [built(late)]


def test_torch_settings_of_the_caller_are_untouched(tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    inside: list[int] = []
    try:
        torch.set_num_threads(threads + 1)
        prepare_demo(config(tmp_path), lambda done, total, text: inside.append(torch.get_num_threads()))
        assert set(inside) == {1}
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_demo_the_configuration_comes_back_unchanged() -> None:
    plain = msgspec.convert({"model": {"path": "m"}, "data": {"train": "t.jsonl"}}, Config)
    assert prepare_demo(plain, interrupt) == (plain, 0.0)


def test_cache_defaults_to_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anywhere = msgspec.structs.replace(config(tmp_path).demo, cache="")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_root(anywhere) == tmp_path / "dapo-async"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_root(anywhere) == tmp_path / ".cache" / "dapo-async"


def test_a_cache_that_is_a_file_and_a_build_that_lost_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"demo\.cache: cannot write to .*file"):
        prepare_demo(config(tmp_path / "file"), silent)
    resolved, _ = prepare_demo(config(tmp_path), silent)
    Path(resolved.data.train).unlink()
    with pytest.raises(ConfigError, match=r"has lost train\.jsonl: delete that folder"):
        prepare_demo(config(tmp_path), silent)
