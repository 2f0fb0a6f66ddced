"""`raydmd export --push`: huggingface_hub uploads to a hub on loopback, and a hub's refusal is one line."""

from pathlib import Path

import pytest
from hub_uploads import upload_server

from raydmd.errors import RunError, UserError
from raydmd.export.push import check_name, push


def test_a_folder_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n# x\n")
    (tmp_path / "adapters" / "phase-1.safetensors").write_bytes(b"\0weights")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    with upload_server() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert check_name("Someone/student") == "Someone/student"
        assert push(tmp_path, "Someone/student") == f"{hub.endpoint}/Someone/student"
        assert hub.made[0]["name"] == "student" and hub.made[0]["visibility"] == "private"
        assert hub.files == {
            "README.md": (tmp_path / "README.md").read_bytes(), "adapters/phase-1.safetensors": b"\0weights",
        }  # fmt: skip
        hub.status = 403
        with pytest.raises(RunError, match=r"^--push Someone/student: .*the export is in .*tries again$") as refused:
            push(tmp_path, "Someone/student")
        assert "\n" not in str(refused.value)


def test_a_name_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("student", "a/b/c", "a b/c"):
        with pytest.raises(UserError, match="OWNER/NAME is needed"):
            check_name(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        check_name("Someone/student")
