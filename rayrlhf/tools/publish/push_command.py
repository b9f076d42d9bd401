"""`rayrlhf push`."""

from pathlib import Path
from typing import Annotated

import typer

from rayrlhf.errors import UserError


def push(
    run: Annotated[Path, typer.Argument(help="The folder of a run with an exported model.")],
    to: Annotated[str, typer.Option(help="Repository on the Hugging Face hub: OWNER/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Create a public repository; private if not given.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and the files, send nothing.")] = False,
) -> None:
    """Upload a run's model to the Hugging Face hub, with a card of the run."""
    from rayrlhf.tools.publish.model_card import model_card, model_files

    card, files = model_card(run), list(model_files(run))
    if not files:
        raise UserError(f"{run}: no export/; expected the folder of a finished run")
    if dry_run:
        typer.echo("\n".join([card, *(f"{path.relative_to(run / 'export')}: {path.stat().st_size} bytes" for path in files)]))
        return
    typer.echo(f"model: {upload(to, card, run / 'export', files, private=not public)}")


def upload(repository: str, card: str, folder: Path, files: list[Path], *, private: bool) -> str:
    """Upload card and files as one commit; returns its URL.

    Raises:
        UserError: no valid name or token, no permission, a public repository for a private model, or a failed upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]  # httpx2 in 2.4, earlier httpx

    try:
        operations = [CommitOperationAdd("README.md", card.encode())]
        operations += [CommitOperationAdd(str(path.relative_to(folder)), path) for path in files]
        api = HfApi(library_name="rayrlhf", token=True)
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:  # an existing repository keeps its visibility
            raise UserError(f"--to {repository}: exists and is public; pass --public, or choose another")
        return str(api.create_commit(repository, operations, commit_message="Upload the model of a run").commit_url)
    except HFValidationError as error:
        raise UserError(f"--to {repository!r}: {str(error).splitlines()[0]}") from error
    except LocalTokenNotFoundError as error:
        raise UserError("push: no token of the Hugging Face hub; run `hf auth login`, or set HF_TOKEN") from error
    except (HfHubHTTPError, ClientError, RuntimeError, ValueError, OSError) as error:  # uploads raise all
        causes = [" ".join(str(one).split())[:300].rstrip(".") for one in (error, error.__cause__) if one is not None]
        raise UserError(f"push: {repository}: {': '.join(causes)}; push again once that is mended") from error
