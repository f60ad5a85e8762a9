"""Adapters on disk: what is saved comes back to the bit, what does not fit is refused, a write is all or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core import AdamParams, DamagedCheckpoint, TrainingClient, clients
from core.checkpoints import check_name, resolve, write_atomically
from tests.tiny import assert_close, data, factors, flat, new_client, service_at, tiny_model_dir

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture(scope="module", autouse=True)
def engine_stays(tmp_path_factory) -> Iterator[None]:
    """One client more, so that the tests share an engine."""
    client = new_client(tmp_path_factory.mktemp("store"), noise=False)
    yield
    client.close()


def step(client: TrainingClient, seed: int) -> None:
    client.forward_backward(data((5, 17, 9), seed), "cross_entropy").result()
    client.optim_step(AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=1.0)).result()


def trained(store: Path, rank: int = 3, **targets) -> TrainingClient:
    client = new_client(store, rank=rank, seed=7, **targets)
    for seed in range(2):
        step(client, seed)
    return client


def test_save_load_next_step_is_bit_equal_with_moments_step_count_and_accumulated_gradient(tmp_path: Path) -> None:
    client = trained(tmp_path)
    client.forward_backward(data((8, 3), 5), "cross_entropy").result()
    saved = client.save_state("mid").result()
    restored = service_at(tmp_path).create_training_client_from_state_with_optimizer(saved.path).result()
    assert restored.adapter.config == client.adapter.config
    for one in (client, restored):
        for seed in (11, 12):
            step(one, seed)
    ours, theirs = flat(restored), flat(client)
    assert restored.adapter.step == client.adapter.step == 4
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    for one in (client, restored):
        one.close()


def test_saving_changes_nothing(tmp_path: Path) -> None:
    saving, plain = trained(tmp_path), trained(tmp_path)
    saving.save_state("a").result()
    for one in (saving, plain):
        step(one, 3)
    assert torch.equal(flat(saving)["params"], flat(plain)["params"])
    for one in (saving, plain):
        one.close()


def test_from_state_has_the_weights_and_fresh_moments(tmp_path: Path) -> None:
    client = trained(tmp_path)
    client.forward_backward(data((8,)), "cross_entropy").result()
    saved = client.save_state("a").result()
    fresh = service_at(tmp_path).create_training_client_from_state(saved.path).result()
    assert torch.equal(flat(fresh)["params"], flat(client)["params"])
    assert fresh.adapter.step == 0 and not fresh.adapter.has_grad
    assert not any(flat(fresh)[key].any() for key in ("grad", "exp_avg", "exp_avg_sq"))
    for one in (client, fresh):
        one.close()


def test_load_state_replaces_weights_and_drops_what_had_been_accumulated(tmp_path: Path) -> None:
    client = trained(tmp_path)
    saved, before = client.save_state("a").result(), flat(client)
    expected = client.forward(data((9,)), "cross_entropy").result().metrics["loss:sum"]
    step(client, 5)
    assert client.forward(data((9,)), "cross_entropy").result().metrics["loss:sum"] != expected
    client.forward_backward(data((4,)), "cross_entropy").result()
    client.load_state(saved.path, with_optimizer=True).result()
    assert client.forward(data((9,)), "cross_entropy").result().metrics["loss:sum"] == expected
    assert all(torch.equal(flat(client)[key], value) for key, value in before.items())
    assert client.adapter.step == 2 and not client.adapter.has_grad
    client.forward_backward(data((4,)), "cross_entropy").result()
    client.load_state(saved.directory).result()
    assert not client.adapter.has_grad
    client.close()


def test_a_uri_and_its_directory_are_the_same_place(tmp_path: Path) -> None:
    client = trained(tmp_path)
    saved = client.save_state("000020").result()
    assert saved.path == f"tinker://{client.training_run_id}/weights/000020"
    assert Path(saved.directory) == tmp_path / client.training_run_id / "weights" / "000020"
    assert resolve(saved.path, tmp_path) == resolve(saved.directory, tmp_path / "elsewhere") == Path(saved.directory)
    assert sorted(path.name for path in Path(saved.directory).iterdir()) == FILES
    about = json.loads((tmp_path / client.training_run_id / "run.json").read_text())
    assert about["training_run_id"] == client.training_run_id
    assert about["lora"]["rank"] == 3
    client.close()


def test_training_run_ids_are_unique_and_count_up(tmp_path: Path) -> None:
    service, other = service_at(tmp_path), service_at(tmp_path)
    ids = [service.new_training_run_id() for _ in range(2)] + [other.new_training_run_id()]
    assert [name.split(":")[1:] for name in ids] == [["train", "0"], ["train", "1"], ["train", "0"]]
    assert len(set(ids)) == 3


def test_a_name_in_use_is_refused_unless_overwritten(tmp_path: Path) -> None:
    client = trained(tmp_path)
    client.save_state("a").result()
    step(client, 9)
    with pytest.raises(ValueError) as error:
        client.save_state("a").result()
    assert str(error.value) == (
        f"checkpoint 'a' of {client.training_run_id} exists already; choose another name or overwrite=True"
    )
    saved = client.save_state("a", overwrite=True).result()
    fresh = service_at(tmp_path).create_training_client_from_state(saved.path).result()
    assert torch.equal(flat(fresh)["params"], flat(client)["params"])
    assert [path.name for path in Path(saved.directory).parent.iterdir()] == ["a"]
    for one in (client, fresh):
        one.close()


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a\\b", "a\0b", "a\nb", "a\x1b[2J"])
def test_names_are_one_path_segment(name: str) -> None:
    with pytest.raises(ValueError, match="must be one path segment of printable characters that does not start with a dot"):
        check_name(name)


@pytest.mark.parametrize(
    "uri", ["tinker://", "tinker://a", "tinker://a/weights", "tinker://a/other/b", "tinker://a/weights/b/c",
            "tinker:///weights/b", "tinker://../weights/b", "tinker://a/weights/.."],
)  # fmt: skip
def test_uris_of_another_form_are_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        resolve(uri, tmp_path)
    assert str(error.value) == (
        f"'{uri}' is not of the form tinker://<training_run_id>/<weights|sampler_weights|external_weights>/<name>"
    )


def test_checkpoints_that_are_not_there_are_refused(tmp_path: Path) -> None:
    service = service_at(tmp_path)
    with pytest.raises(ValueError, match=rf"^no checkpoint tinker://x:train:0/weights/a in {tmp_path}$"):
        service.create_training_client_from_state("tinker://x:train:0/weights/a").result()
    with pytest.raises(ValueError, match=f"^no checkpoint directory at {tmp_path / 'nothing'}$"):
        service.create_training_client_from_state_with_optimizer(tmp_path / "nothing").result()


def test_another_rank_or_other_targets_are_refused_naming_both(tmp_path: Path) -> None:
    client = trained(tmp_path, rank=3)
    saved = client.save_state("a").result()
    for rank, targets, theirs, ours in [
        (5, {}, "rank=3", "rank=5"),
        (3, {"train_mlp": False}, "train_mlp=True", "train_mlp=False"),
        (3, {"train_unembed": False}, "train_unembed=True", "train_unembed=False"),
    ]:
        other = new_client(tmp_path, rank=rank, **targets)
        before = flat(other)
        with pytest.raises(ValueError, match=rf"holds LoraConfig\(.*{theirs}.*this client has LoraConfig\(.*{ours}"):
            other.load_state(saved.path)
        assert all(torch.equal(flat(other)[key], value) for key, value in before.items())
        other.close()
    client.close()


def test_another_seed_of_the_same_geometry_is_taken(tmp_path: Path) -> None:
    client, other = trained(tmp_path), new_client(tmp_path, rank=3, seed=99)
    other.load_state(client.save_state("a").result().path).result()
    assert torch.equal(flat(other)["params"], flat(client)["params"])
    for one in (client, other):
        one.close()


def test_another_base_model_is_refused_naming_both(tmp_path: Path) -> None:
    client = trained(tmp_path)
    saved, engine = client.save_state("a").result(), client.engine
    other = str(tiny_model_dir("llama-tied"))
    for restore in (
        lambda: service_at(tmp_path).create_training_client_from_state(saved.path, other).result(),
        lambda: new_client(tmp_path, "llama-tied", rank=3).load_state(saved.path).result(),
    ):
        with pytest.raises(ValueError) as error:
            restore()
        message = str(error.value)
        assert f"was trained on {tiny_model_dir()} ({engine.fingerprint})" in message
        assert f"this engine holds {other} (" in message
    client.close()
    del error, restore


def test_an_engine_opened_for_a_checkpoint_that_does_not_load_is_let_go(tmp_path: Path) -> None:
    client = trained(tmp_path)
    saved = client.save_state("a").result()
    client.close()
    for _ in range(2):
        with pytest.raises(ValueError, match="this engine holds"):
            service_at(tmp_path).create_training_client_from_state(saved.path, str(tiny_model_dir("qwen2"))).result()
        assert [key[0] for key in clients._engines] == [str(tiny_model_dir())]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble(file: Path) -> None:
    file.write_bytes(b"\xff\xfe" + file.read_bytes()[2:])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, garble, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_file_is_said_to_be_damaged_and_nothing_is_loaded(file: str, damage, tmp_path: Path) -> None:
    client = trained(tmp_path)
    saved, before = client.save_state("a").result(), flat(client)
    step(client, 5)
    after = flat(client)
    damage(Path(saved.directory) / file)
    service = service_at(tmp_path)
    with pytest.raises((DamagedCheckpoint, ValueError)) as error:
        service.create_training_client_from_state_with_optimizer(saved.path).result()
    if not (file == "state.json" and damage is Path.unlink):  # then it is a plain adapter directory
        assert isinstance(error.value, DamagedCheckpoint)
        assert file in str(error.value)
    else:
        assert str(error.value) == f"{saved.directory} has no optimizer state (no state.json): load its weights alone"
    if file != "adapter_config.json":  # which only tells from_state the base model
        with pytest.raises(ValueError):
            client.load_state(saved.path, with_optimizer=True).result()
    assert all(torch.equal(flat(client)[key], value) for key, value in after.items())
    assert not torch.equal(before["params"], after["params"])
    client.close()


def test_moments_of_another_shape_are_damage(tmp_path: Path) -> None:
    client, other = trained(tmp_path, rank=3), trained(tmp_path, rank=4)
    saved, theirs = client.save_state("a").result(), other.save_state("a").result()
    shutil.copy(Path(theirs.directory) / "optimizer.safetensors", Path(saved.directory))
    with pytest.raises(
        DamagedCheckpoint, match=r"optimizer.safetensors holds .*, 4\].*, expected exp_avg and exp_avg_sq of \[.*, 3\]"
    ):
        service_at(tmp_path).create_training_client_from_state_with_optimizer(saved.path).result()
    for one in (client, other):
        one.close()


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    client = trained(tmp_path)
    saved = client.save_state("a").result()
    file = Path(saved.directory) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="has checkpoint format 99, this version reads 1"):
        client.load_state(saved.path)
    client.close()


def test_a_write_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def full_disk(directory: Path) -> None:
        (directory / "half").write_text("some")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "weights" / "a", full_disk)
    assert list((tmp_path / "weights").iterdir()) == []
    write_atomically(tmp_path / "weights" / "a", lambda directory: (directory / "x").write_text("first"))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "weights" / "a", full_disk)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["a"]
    assert (tmp_path / "weights" / "a" / "x").read_text() == "first"


def test_an_overwritten_checkpoint_is_the_old_one_until_it_is_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_atomically(target, lambda directory: (directory / "x").write_text("old"))

    def fill(directory: Path) -> None:
        assert (target / "x").read_text() == "old"
        (directory / "x").write_text("new")

    write_atomically(target, fill)
    assert (target / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_save_that_fails_travels_through_the_future_and_training_goes_on(tmp_path: Path) -> None:
    client = trained(tmp_path)
    (tmp_path / client.training_run_id).write_text("a file where the directory should be")
    with pytest.raises(OSError):
        client.save_state("a").result()
    step(client, 5)
    (tmp_path / client.training_run_id).unlink()
    assert Path(client.save_state("a").result().directory).is_dir()
    client.close()


def test_a_saved_adapter_is_fp32_and_says_which_base_it_is_for(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    client = trained(tmp_path, train_unembed=False)
    directory = Path(client.save_state("a").result().directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 32, str(tiny_model_dir()))
    assert "lm_head" not in config["target_modules"]
    tensors = load_file(directory / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for name, (a, b) in factors(client).items():
        assert_close(tensors[f"base_model.model.{name}.lora_A.weight"], a, 0)
        assert_close(tensors[f"base_model.model.{name}.lora_B.weight"], b, 0)
    client.close()
