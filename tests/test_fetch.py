"""Claims about the hub: it is asked only when asked for, and its absence is told at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from headway.fetch import fetch


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Touching the hub's library is a failure."""

    def touched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", touched)
    monkeypatch.setattr(huggingface_hub, "HfApi", touched)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("kind", ["folder", "file", "named like an id"])
def test_a_path_that_exists_is_never_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    path: Any = {"folder": tmp_path / "owner", "file": tmp_path / "m.safetensors", "named like an id": "owner/name"}[
        kind
    ]
    Path(path).touch() if kind == "file" else Path(path).mkdir(exist_ok=True)
    assert fetch(path) == Path(path)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "source",
    ["gpt2", "./owner/name", "/owner/name", "../owner/name", "~/name", "owner/name/deep", "owner/..", "owner\\name",
     "https://huggingface.co/owner/name", "owner/name@", "owner/name@../../x", "owner/na\nme", "", "a\0b/c", "-o/name"],
)  # fmt: skip
def test_what_is_no_id_is_refused_without_asking(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as fault:
        fetch(source)
    assert "\n" not in str(fault.value)
    assert "no such file or folder" in str(fault.value)


@pytest.mark.usefixtures("no_hub")
def test_a_misspelt_folder_is_not_sent_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="runs/dmeo@main"):
        fetch("runs/dmeo")
    with pytest.raises(ValueError, match="no such file or folder"):
        fetch(Path("owner/name"))  # a Path is a path


@pytest.mark.parametrize("source", ["owner/name", "owner/name@v1.0", "owner/name@" + "0" * 40])
def test_offline_says_so_at_once(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.perf_counter()
    with pytest.raises(ValueError) as fault:
        fetch(source)
    assert time.perf_counter() - began < 1
    said = str(fault.value)
    assert said.startswith(source)
    assert "HF_HUB_OFFLINE" in said
    assert "\n" not in said


def test_offline_what_was_downloaded_before_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout is that of the hub's own cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    revision = "0123456789" * 4
    snapshot = tmp_path / "models--owner--name" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}", "utf-8")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text(revision, "utf-8")
    assert fetch("owner/name") == snapshot
    assert fetch(f"owner/name@{revision}") == snapshot


class GatedRepoError(Exception):
    pass


class RepositoryNotFoundError(Exception):
    pass


class RevisionNotFoundError(Exception):
    pass


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (GatedRepoError("403"), "accept them at https://huggingface.co/owner/name"),
        (RepositoryNotFoundError("404"), "hf auth login"),
        (RevisionNotFoundError("404"), "no revision v9"),
        (ConnectionError("line one\nline two"), "go online"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_refusal_of_the_hub_says_what_to_do(fault: Exception, advice: str) -> None:
    from headway.fetch import _reason

    assert isinstance(fault, ConnectionError) or hasattr(huggingface_hub.errors, type(fault).__name__)
    said = _reason("owner/name", "v9", fault)
    assert advice in said
    assert "\n" not in said
