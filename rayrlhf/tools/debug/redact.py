"""Removal of secrets from texts: tokens, keys, passwords, URLs with credentials."""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

HIDDEN = "[removed]"
SHORTEST = 6
"""Fewest characters of a value that is removed everywhere."""
ENDINGS = (
    "password", "passwd", "pwd", "passphrase", "secret", "token", "credential", "credentials", "authorization", "cookie",
    "signature", "api_key", "apikey", "access_key", "access_key_id", "account_key", "private_key", "secret_key", "session_key",
    "license_key", "encryption_key", "passwords", "secrets", "api_keys", "apikeys", "access_keys", "secret_keys",
)  # fmt: skip
"""Last words of names whose values are secrets."""
PUBLIC = re.compile(r"(?:^|_)(?:eos|bos|pad|unk|sep|cls|mask|stop|per|new)_token$")
"""Names that end in one of them and have no secret, unless the value looks like one."""
_COUNT = re.compile(r"[-+]?[\d.]+(?:e[-+]?\d+)?")
_NOTHING = re.compile(r"(?i)true|false|null|none|~|")
_PATTERNS = (
    (re.compile(r"-----BEGIN [^-\n]*PRIVATE KEY-----.*?(?:-----END [^-\n]*-----|\Z)", re.DOTALL), HIDDEN),
    (
        re.compile(r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie)(\\?[\"']?[ \t]*[:=][ \t]*\\?[\"']?)[^\n\"'\\]+"),
        rf"\1\2{HIDDEN}",
    ),
    (re.compile(r"(?i)\b(bearer|basic|digest) +[\w.~+/=:-]{6,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"(?i)([a-z][a-z0-9+.-]*://)[^/\s@\"'<>]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(?i)([?&][\w-]*(?:key|sig|signature|token|auth|credential|secret|password)=)[^&\s\"'<>]+"), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}"
            r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|nvapi-[\w-]{16,}|r8_\w{20,})"
        ),
        HIDDEN,
    ),
)
_NAMED = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]*)(?P<sep>\\?["']?\]?[ \t]*[:=][ \t]*|["'],[ \t]*)"""
    r"""(?P<value>\\"[^"\n]*"|"[^"\n]*"|'[^'\n]*'|[^\s"',;&}\])]+)"""
)
_OPTION = re.compile(r"""(?P<name>--[\w-]+)(?P<sep>["']?,?[ \t]+["']?)(?P<value>[^\s"',-][^\s"',]*)""")


def redacted(text: str, known: Iterable[str] = ()) -> str:
    """Return a text without secrets.

    Args:
        known: values that are removed everywhere, see `known_secrets`.
    """
    for value in sorted(known, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return _OPTION.sub(_hide, _NAMED.sub(_hide, text))


def redacted_tree(tree: Any, known: Iterable[str] = (), name: str = "") -> Any:
    """Return settings or records without secrets, by key names and by values."""
    known = list(known)
    if isinstance(tree, Mapping):
        below = name if is_secret(name, "?") else ""
        return {redacted(str(key), known): redacted_tree(value, known, below or str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted_tree(value, known, name) for value in tree]
    if is_secret(name, str(tree)):
        return HIDDEN
    return redacted(tree, known) if isinstance(tree, str) else tree


def is_secret(name: str, value: str) -> bool:
    """Return True if a value is a secret by its name, unlike `max_new_tokens`."""
    words = re.sub(r"[^a-z]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()).strip("_")
    secret = any(words == ending or words.endswith(f"_{ending}") for ending in ENDINGS)
    count = words.endswith("token") and _COUNT.fullmatch(value)
    return bool(secret and not count and not PUBLIC.search(words) and not _NOTHING.fullmatch(value) and value != HIDDEN)


def known_secrets(environments: Iterable[Mapping[str, str]] = ()) -> set[str]:
    """Return the secrets of this user: environment variables, token files of Hugging Face and Ray.

    Args:
        environments: of processes of the run, besides this one's.
    """
    found = {
        value.strip()
        for environment in (os.environ, *environments)
        for name, value in environment.items()
        if is_secret(name, value) or name.lower().endswith(("_key", "_pass", "token"))
    }
    files = [Path.home() / ".cache" / "huggingface" / "token", Path.home() / ".ray" / "auth_token"]
    for path in (*files, *(Path(os.environ[name]) for name in ("HF_TOKEN_PATH", "RAY_AUTH_TOKEN_PATH") if name in os.environ)):
        with suppress(OSError, UnicodeDecodeError):
            found.add(path.expanduser().read_text(encoding="utf-8").strip())
    return {value for value in found if len(value) >= SHORTEST}


def _hide(match: re.Match[str]) -> str:
    value = match["value"].strip("\"'")
    return f"{match['name']}{match['sep']}{HIDDEN}" if is_secret(match["name"], value) else match[0]
