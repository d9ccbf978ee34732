"""Profiles and model shapes that come with the project, and reading a user's own."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_disagg.core.profile import Profile, from_distserve, is_distserve, parse_profile
from vllm_disagg.errors import ConfigError
from vllm_disagg.profiles.shapes import SHAPES

_FOLDER = Path(__file__).parent


def builtin_profiles() -> tuple[str, ...]:
    """Names that `load_profile` takes beside a path."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.json")))


def load_profile(name_or_path: str, *, model: str | None = None) -> Profile:
    """Read a profile.

    Args:
        name_or_path: one of `builtin_profiles`, or a JSON file: ours, or the table DistServe published.
        model: which model, where the file holds several; where it holds one, the model it has to be of.

    Raises:
        ConfigError: there is no such profile, it is malformed, or it is of another model.
    """
    builtin = _FOLDER / f"{name_or_path}.json"
    path = builtin if name_or_path in builtin_profiles() else Path(name_or_path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"no profile {name_or_path!r} ({error.strerror}): "
            f"give a JSON file or one of {', '.join(builtin_profiles())}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{name_or_path} is not JSON: {error}; expected a profile, as `vllm-disagg profile` writes it"
        ) from error
    if not is_distserve(document):
        profile = parse_profile(document, origin=str(path))
        if model is not None and profile.model.name != model:
            raise ConfigError(
                f"{name_or_path} is of {profile.model.name}, not {model!r}: give the profile of that model"
            )
        return profile
    if model not in SHAPES:
        raise ConfigError(
            f"{path} holds several models: name one of {', '.join(sorted(SHAPES))}"
            + (f", not {model!r}" if model else "")
        )
    return from_distserve(document, SHAPES[model], origin=str(path))
