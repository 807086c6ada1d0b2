"""Heads and blocks in folders and on the model hub, in the words of `transformers`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from featxfer.modules.artifact import CARD, WEIGHTS, ArtifactError, load_head, save_head
from featxfer.modules.base import Card, TransferModule

T = TypeVar("T", bound="HubModule")


class HubModule(TransferModule):
    """A module that is saved, loaded, uploaded and downloaded with its card."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes weights, card and README into a folder; see `featxfer.save_head`.

        Args:
            save_directory: made if need be.
            repo_id: with `push_to_hub`; by default the folder's name.
            push_to_hub: whether to upload as well; returns the commit's address then.
            **push_to_hub_kwargs: see `push_to_hub`.

        Raises:
            ValueError: it has no card, so nothing says what it is for.
            TypeError: `repo_id` or arguments of `push_to_hub` without it, or unknown ones.
            DiskError: the disk refuses; what was saved there before is as it was.
        """
        without = [*push_to_hub_kwargs, *(["repo_id"] if repo_id is not None else [])]
        if without and not push_to_hub:
            raise TypeError(f"got {sorted(without)} without push_to_hub=True")
        save_head(self, save_directory, self._own_card())
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or Path(save_directory).name, **push_to_hub_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        commit_message: str = "Push model using huggingface_hub.",
        **upload: Any,
    ) -> str:
        """Uploads weights, card and README; returns the commit's address.

        The repository is made if need be, then `private` if asked; `token` is by default the one
        that `hf auth login` left, `branch` "main". `upload` are arguments of
        `huggingface_hub.HfApi.upload_folder`. Raises `ValueError` where it has no card.
        """
        from huggingface_hub import HfApi

        card, api = self._own_card(), HfApi(token=token)
        repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            commit = api.upload_folder(
                repo_id=repo_id,
                repo_type="model",
                folder_path=save_head(self, folder, card),
                commit_message=commit_message,
                revision=branch,
                **upload,
            )
        return str(commit)

    def _own_card(self) -> Card:
        if self.card is None:
            raise ValueError(
                f"card: this {self.kind} has none; train it with fit_transfer, or set its `card`"
            )
        return self.card

    @classmethod
    def from_pretrained(
        cls: type[T], pretrained_model_name_or_path: str | Path, **download: Any
    ) -> T:
        """Reads what `save_pretrained` wrote, on the CPU, in eval mode, with its card.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repository on the model hub.
            **download: arguments of `huggingface_hub.snapshot_download`: revision, token, ...

        Raises:
            TypeError: arguments of the download with a folder.
            FileNotFoundError: no such folder, or the hub cannot be reached or has none of it.
            ArtifactError: damaged files, or one of another kind.
        """
        folder = find_files(pretrained_model_name_or_path, **download)
        module, _ = load_head(folder)
        if not isinstance(module, cls):
            raise ArtifactError(f"{folder}: holds a {module.kind}, wanted a {cls.__name__}")
        return module


def find_files(source: str | Path, **download: Any) -> Path:
    """The folder of a saved module: `source` itself, or where the hub's files were put."""
    if Path(source).is_dir():
        if download:
            raise TypeError(f"got {sorted(download)} with the folder {str(source)!r}")
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=[WEIGHTS, CARD], **download))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"head: {str(source)!r} is no folder, and the model hub gave none: {error}"
        ) from error
