"""Errors of releases: one base that says what is wrong, one for what is not there."""


class ReleaseError(RuntimeError):
    """A release is damaged, incomplete, or not what the request needs."""


class ReleaseNotFoundError(ReleaseError, FileNotFoundError):
    """There is no release at the given path or URL."""
