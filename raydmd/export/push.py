"""Uploading an export to the Hugging Face hub."""

import re
from pathlib import Path

from raydmd.errors import RunError, UserError
from raydmd.export.description import read_description
from raydmd.models.base import one_line
from raydmd.models.diffusers.hub import PART
from raydmd.runs.folders import EXPORT, is_export

WORDS = "Export of raydmd"


def check_name(name: str) -> str:
    """Return a hub's name.

    Raises:
        UserError: it is not ``owner/name``, or the hub is switched off by HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants

    if not re.fullmatch(f"{PART}/{PART}", name):
        raise UserError(f"--push {name}: OWNER/NAME is needed, as the hub has it")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {name}: HF_HUB_OFFLINE forbids to ask the hub")
    return name


def push(folder: Path, name: str) -> str:
    """Upload a folder to a model of the hub, made (private) if it is not there; return its page's address.

    Of export.json all is uploaded but a base model's path on this machine.

    Args:
        folder: the export.
        name: ``owner/name``.

    Raises:
        RunError: the hub does not answer, or refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        page = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=WORDS, ignore_patterns=[EXPORT])
        if is_export(folder):
            said = read_description(folder).without_path().text().encode()
            api.upload_file(repo_id=name, path_or_fileobj=said, path_in_repo=EXPORT, commit_message=WORDS)
    except Exception as error:  # of the network, of the token, of the hub's permissions
        raise RunError(f"--push {name}: {one_line(error)}; the export is in {folder}: `hf upload {name} {folder}` "
                       f"tries again") from error  # fmt: skip
    return str(page)
