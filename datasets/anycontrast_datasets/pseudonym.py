"""Pseudonyms and splits: what a subject is called in the manifest, and which split they are in.

A plain hash of a short id is undone by trying all ids; hence a keyed one (HMAC-SHA256), with a key
that lies outside the data. The split depends on the subject alone, so added data never move anyone
and all sessions of a subject stay together.
"""

import base64
import hashlib
import hmac
import logging
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from anycontrast_datasets.files import write_atomically
from anycontrast_datasets.study import SPLITS, ManifestError

logger = logging.getLogger(__name__)

MIN_KEY_BYTES = 16
_PSEUDONYM_CHARS = 16  # 80 bits: no collision is expected below 10^11 ids
STUDY_ID = re.compile(r"[a-z0-9_-]+")


@dataclass(frozen=True)
class Identity:
    """How one session of one subject is named in the manifest."""

    study_id: str
    subject_id: str
    session_id: str
    split: str


class Naming(Protocol):
    """From the subject and session of a source to an identity."""

    def __call__(self, subject: str, session: str) -> Identity:
        """Return the identity of a session; the same arguments give the same answer."""

    def site(self, institution: str, serial: str) -> str:
        """Return what a scanner at an institution is called; empty when neither is known."""


@dataclass(frozen=True)
class SplitRule:
    """Assigns subjects to train, val and test by a salted hash."""

    dataset: str
    salt: str
    fractions: tuple[float, float, float]
    """Of train, val, test; they sum to 1."""

    def __call__(self, subject: str) -> str:
        """Return the split of a subject."""
        digest = _digest(self.salt.encode(), "split", self.dataset, subject)
        position = int.from_bytes(digest[:8], "big") / 2**64
        bounds = (self.fractions[0], self.fractions[0] + self.fractions[1])
        return SPLITS[sum(position >= bound for bound in bounds)]


@dataclass(frozen=True)
class PseudonymNaming:
    """Keyed pseudonyms: for anything that may be a person."""

    key: bytes
    dataset: str
    split: SplitRule

    def __call__(self, subject: str, session: str) -> Identity:
        """Return pseudonyms that cannot be undone without the key."""
        return Identity(
            study_id=self._name("study", subject, session),
            subject_id=self._name("subject", subject),
            session_id=self._name("session", subject, session),
            split=self.split(subject),
        )

    def site(self, institution: str, serial: str) -> str:
        """Return a pseudonym that cannot be undone without the key; case and blanks do not count.

        Args:
            institution: Name as in the header; blank when not known.
            serial: Of the scanner (DeviceSerialNumber, StationName); blank when not known.
        """
        parts = [" ".join(text.lower().split()) for text in (institution, serial)]
        return self._name("site", *parts) if any(parts) else ""

    def _name(self, *parts: str) -> str:
        digest = _digest(self.key, parts[0], self.dataset, *parts[1:])
        return base64.b32encode(digest).decode("ascii").lower()[:_PSEUDONYM_CHARS]


@dataclass(frozen=True)
class PlainNaming:
    """The source's own ids: for synthetic data only."""

    dataset: str
    split: SplitRule

    def __call__(self, subject: str, session: str) -> Identity:
        """Return e.g. `phantom-0001-1` for subject 0001, session 1."""
        parts = [part for part in (self.dataset, subject, session) if part]
        study_id = re.sub(r"[^a-z0-9_-]+", "_", "-".join(parts).lower())
        return Identity(study_id, subject, session, self.split(subject))

    def site(self, institution: str, serial: str) -> str:
        """Return e.g. `site-a-12`; empty when neither is known."""
        text = " ".join(part for part in (institution.strip(), serial.strip()) if part)
        return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-")


def load_key(path: Path | None, generated: Path) -> bytes:
    """Return the pseudonym key; make one at `generated` (mode 0600) when none was given.

    Args:
        path: Key file of the user; None for the generated one.
        generated: Where a generated key is kept, and found again by the next scan.

    Raises:
        ManifestError: a given file is missing, or a key is too short.
    """
    if path is None and not generated.exists():
        generated.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(generated, f"{secrets.token_hex(32)}\n".encode(), mode=0o600)
        logger.info("made a new pseudonym key; keep it: another key gives other study ids")
    source = path or generated
    if not source.is_file():
        raise ManifestError(
            f"reading the pseudonym key: no file at {source}; correct "
            "scan.pseudonym_key_file, or leave it out to have a key made"
        )
    if source.stat().st_mode & 0o077:
        logger.warning("the pseudonym key file can be read by others; chmod 600 it")
    key = source.read_bytes().strip()
    if len(key) < MIN_KEY_BYTES:
        raise ManifestError(
            f"reading the pseudonym key {source}: must hold at least {MIN_KEY_BYTES} bytes, found "
            f"{len(key)}; write 32 random bytes into it (e.g. `openssl rand -hex 32`)"
        )
    return key


def _digest(key: bytes, *parts: str) -> bytes:
    # Length prefixes keep ("ab", "c") and ("a", "bc") apart.
    message = b"".join(
        len(encoded).to_bytes(4, "big") + encoded
        for encoded in (part.encode("utf-8", "surrogateescape") for part in parts)
    )
    return hmac.new(key, message, hashlib.sha256).digest()
