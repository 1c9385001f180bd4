"""Takes out of a text what nobody should read again: keys, addresses, numbers of cards."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SECRETS = (
    # Keys by the way their makers write them.
    r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}",
    r"\b(?:hf|gh[oprsu]|glpat|xox[abeprs])[-_][A-Za-z0-9_-]{16,}",
    r"\bgithub_pat_\w{20,}",
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    r"\bAIza[0-9A-Za-z_-]{35}",
    r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    # And whatever is called one.
    r"(?i:\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}",
    r"(?i:\b(?:(?:api[-_ ]?key|password|passwd|access[-_ ]?token)[\"']?\s*(?:is\b\s*[:=]?|[:=])"
    r"|secret[\"']?\s*[:=])\s*)"
    r"(?:\"[^\"\n]+\"|'[^'\n]+'|[^\s\"',;]+)",
    r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}",
)
_CARD = re.compile(r"(?<!\d)(?<!\d\.)\d(?:[ -]?\d){12,18}(?!\.?\d)")
GONE = "[redacted]"


class Redactor:
    """Knows what is to go: our own patterns, and further regular expressions."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        every = "|".join(f"(?:{one})" for one in _SECRETS)
        self._patterns = (re.compile(every, re.DOTALL), *map(re.compile, patterns))

    def redact(self, text: str) -> str:
        """Return a text with `[redacted]` where something was."""
        for pattern in self._patterns:
            text = pattern.sub(GONE, text)
        return _CARD.sub(_card, text)


def _card(found: re.Match[str]) -> str:
    digits = [int(one) for one in found[0] if one.isdigit()]
    # Luhn's sum, which a number of a card has, and nine others of ten have not.
    doubled = (sum(divmod(2 * one, 10)) for one in digits[-2::-2])
    return GONE if (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 else found[0]
