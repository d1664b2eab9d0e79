"""The settings of a server: flags, the environment variables behind them, and their defaults."""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..api import BATCH_TOKENS
from ..errors import InputError


@dataclass(frozen=True)
class ServeOptions:
    """max_batch_tokens: in one run of the engine. max_concurrent_requests: more are answered with 429.

    max_client_batch_size: texts in one request. payload_limit: bytes of a request's body. timeout: seconds until a
    request is given up. grace: seconds for the answers to requests that were taken before the signal to stop.
    """

    host: str = "127.0.0.1"
    port: int = 3000
    max_batch_tokens: int = BATCH_TOKENS
    max_concurrent_requests: int = 512
    max_client_batch_size: int = 32
    auto_truncate: bool = True
    payload_limit: int = 2_000_000
    timeout: float = 30.0
    grace: float = 25.0
    api_key: str | None = None
    tei_compat: bool = False

    @classmethod
    def of(cls, found: argparse.Namespace) -> ServeOptions:
        """From parsed flags. Raises InputError for an environment variable that is no truth value."""
        given = {field.name: getattr(found, field.name) for field in fields(cls)}
        for flag, (variable, _) in SWITCHES.items():
            name = flag.replace("-", "_")
            if isinstance(given[name], str):  # the environment's, which argparse does not convert for switches
                if given[name].lower() not in ("true", "false", "1", "0"):
                    raise InputError(f"${variable}: true or false was expected, found {given[name]!r}")
                given[name] = given[name].lower() in ("true", "1")
        return cls(**given)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive integer was expected, found {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port from 0 (any free one) to 65535 was expected, found {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a positive number of seconds was expected, found {text!r}")
    return value


# flag -> (its kind, the environment variable, help). What text-embeddings-inference has too is named as there.
FLAGS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "host": (str, "HOSTNAME", "address to listen on; 0.0.0.0 is every one of this machine"),
    "port": (_port, "PORT", "0 is any free one"),
    "max-batch-tokens": (_count, "MAX_BATCH_TOKENS", "tokens that run together"),
    "max-concurrent-requests": (_count, "MAX_CONCURRENT_REQUESTS", "more are answered with 429"),
    "max-client-batch-size": (_count, "MAX_CLIENT_BATCH_SIZE", "texts in one request"),
    "payload-limit": (_count, "PAYLOAD_LIMIT", "bytes in one request"),
    "timeout": (_seconds, "MINILPT_TIMEOUT", "seconds until a request is given up"),
    "grace": (_seconds, "MINILPT_GRACE", "seconds for the last answers after SIGTERM"),
    "api-key": (str, "API_KEY", "wanted as a Bearer token with every request that uses the model"),
}
SWITCHES = {
    "auto-truncate": ("AUTO_TRUNCATE", "cut texts that are too long, where a request does not say"),
    "tei-compat": ("MINILPT_TEI_COMPAT", "softmax for multi-label models too, as text-embeddings-inference has it"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Every option of ServeOptions. A flag wins over its environment variable, which wins over the default."""
    defaults = vars(ServeOptions())
    for flag, (kind, variable, text) in FLAGS.items():
        default = defaults[flag.replace("-", "_")]
        shown = "" if default is None else f"; default: {default}"
        parser.add_argument(
            f"--{flag}",
            type=kind,
            default=_environment(variable, default),  # a string here is converted as a flag's is
            metavar=flag.rsplit("-", 1)[-1].upper(),
            help=f"{text} (${variable}{shown})",
        )
    for flag, (variable, text) in SWITCHES.items():
        parser.add_argument(
            f"--{flag}",
            action=argparse.BooleanOptionalAction,
            default=_environment(variable, defaults[flag.replace("-", "_")]),
            help=f"{text} (${variable})",
        )


def _environment(variable: str, default: Any) -> Any:
    """The variable's text if it is set and of use, else the default."""
    found = os.environ.get(variable, "")
    if variable == "HOSTNAME" and found:  # container engines put the container's name there
        try:
            ipaddress.ip_address(found)
        except ValueError:
            return default
    return found or default
