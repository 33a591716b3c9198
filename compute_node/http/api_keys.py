"""Who may use the HTTP API: keys from a file or the environment, kept as digests and compared in constant time."""

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from compute_node.config import ComputeConfig
from compute_node.http.loopback import is_loopback
from promoe.config import SettingUnfit

logger = logging.getLogger(__name__)

API_KEYS_VARIABLE: Final = "PROMOE_API_KEYS"
"""Keys separated by commas, in addition to those of the file."""

_MIN_KEY_CHARS: Final = 8


class ApiKeys:
    """The keys that are accepted; without any, everybody is.

    Args:
        keys: as clients send them.

    Raises:
        SettingUnfit: a key is too short to be secret, or has a space.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        accepted = []
        for key in keys:
            if len(key) < _MIN_KEY_CHARS or key.split() != [key] or not key.isascii():
                raise SettingUnfit(
                    f"An API key of {len(key)} characters was given; allowed: {_MIN_KEY_CHARS} or more of ASCII, "
                    "without spaces"
                )
            accepted.append(_digest(key))
        self._digests = tuple(accepted)

    @property
    def are_needed(self) -> bool:
        """False when everybody is let in."""
        return bool(self._digests)

    def accept(self, authorization: str | None) -> bool:
        """True for an `Authorization: Bearer KEY` with one of the keys. All are compared, whatever the first says."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def keys_for(config: ComputeConfig) -> ApiKeys:
    """The keys of a node with an HTTP API.

    Raises:
        SettingUnfit: the keys cannot be read, or others could use the API without one.
    """
    keys = read_api_keys(config.http_api_keys_file, os.environ.get(API_KEYS_VARIABLE))
    host = config.http_listen.rpartition(":")[0]
    if not keys.are_needed and not is_loopback(host) and not config.http_anonymous:
        raise SettingUnfit(
            f"compute.http_listen is {config.http_listen!r}, which others can reach: give keys with "
            f"compute.http_api_keys_file or ${API_KEYS_VARIABLE}, or say that nobody needs one with "
            "compute.http_anonymous=true"
        )
    return keys


def read_api_keys(file: Path | None, variable: str | None) -> ApiKeys:
    """The keys of the file (one a line; `#` begins a comment) and those of the environment variable.

    Raises:
        SettingUnfit: the file cannot be read or has no key.
    """
    keys = [key.strip() for key in (variable or "").split(",") if key.strip()]
    if file is not None:
        keys += _keys_in(file)
    return ApiKeys(keys)


def _keys_in(file: Path) -> list[str]:
    try:
        lines = file.read_text().splitlines()
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise SettingUnfit(f"compute.http_api_keys_file is {str(file)!r}, which cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise SettingUnfit(f"compute.http_api_keys_file is {str(file)!r}, which has no key; expected one a line")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s has API keys and can be read by others; chmod 600 mends that.", file)
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
