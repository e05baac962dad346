"""What an object store's refusal means and what to do about it.

Works on error codes and class names, so that the S3 client itself stays behind its one door, `storage.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from genescale.platform.disk import already_exists
from genescale.platform.errors import AlreadyExistsError, NotFoundError, StorageError

_KEYS = "Check storage.access_key_id and storage.secret_access_key, or the AWS environment."
# Code of the service or class name of the client's error -> what happened, what to do.
_REASONS = {
    "NoCredentialsError": (
        "no credentials were found.",
        "Set storage.access_key_id and storage.secret_access_key, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    ),
    "PartialCredentialsError": ("the credentials are incomplete.", _KEYS),
    "ProfileNotFound": ("the AWS profile does not exist.", "Check AWS_PROFILE, or set storage.access_key_id."),
    "InvalidAccessKeyId": ("the access key is not known there.", _KEYS),
    "SignatureDoesNotMatch": ("the secret key does not fit the access key.", _KEYS),
    "ExpiredToken": ("the credentials have expired.", "Renew them."),
    "AccessDenied": (
        "access denied.",
        "Check what these keys may do there; without the right to list, a missing object looks like this too.",
    ),
    "EndpointConnectionError": ("cannot connect to {endpoint}.", "Check storage.endpoint_url and that it is running."),
    "ConnectTimeoutError": ("no connection to {endpoint} in time.", "Check storage.endpoint_url and the network."),
    "ReadTimeoutError": ("{endpoint} did not answer in time.", "Try again; check its load and the network."),
    "ConnectionClosedError": ("{endpoint} closed the connection.", "Try again; check its load and the network."),
    "SSLError": ("no trusted TLS connection to {endpoint}.", "Check storage.endpoint_url (https or http) and its CA."),
    "PermanentRedirect": ("the bucket lives in another region.", "Set storage.region to the bucket's region."),
    "AuthorizationHeaderMalformed": ("the bucket lives in another region.", "Set storage.region to its region."),
    "SlowDown": ("the store is overloaded.", "Try again later, or with fewer workers."),
    "ServiceUnavailable": ("the store is not available.", "Try again later."),
    "InternalError": ("the store failed internally.", "Try again later."),
}
_SAME = {
    "403": "AccessDenied",
    "Forbidden": "AccessDenied",
    "301": "PermanentRedirect",
    "InvalidToken": "ExpiredToken",
    "503": "ServiceUnavailable",
    "500": "InternalError",
}
_NO_KEY = {"NoSuchKey", "404", "NotFound"}
_CHANGED = {"PreconditionFailed", "412", "S3DownloadFailedError"}


def code_of(error: BaseException) -> str:
    """The service's error code, else the name of the error's class."""
    answer = getattr(error, "response", None)
    code = answer.get("Error", {}).get("Code", "") if isinstance(answer, dict) else ""
    return str(code) or type(error).__name__


def explain(
    error: BaseException, uri: str, *, endpoint: str, creating: bool = False, hidden: Sequence[str] = ()
) -> StorageError:
    """The StorageError that says what `error` means for the address `uri`.

    `endpoint` is shown as it is; `creating` tells a conditional create from a read pinned to a tag; `hidden` texts are
    masked in what the store says.
    """
    code = _SAME.get(code_of(error), code_of(error))
    if code in _NO_KEY:
        return NotFoundError("no such object.", where=uri, fix="Check the address.")
    if code == "NoSuchBucket":
        return no_such_bucket(uri)
    if code == "BucketAlreadyExists":
        return AlreadyExistsError("the bucket belongs to another account.", where=uri, fix="Choose another name.")
    if code in _CHANGED:
        if creating:
            return already_exists(uri)
        return StorageError("was replaced while it was being read.", where=uri, fix="Start the read again.")
    if code in _REASONS:
        what, fix = _REASONS[code]
        return StorageError(what.format(endpoint=endpoint or "the endpoint"), where=uri, fix=fix)
    return StorageError(f"the store refused: {_one_line(error, hidden)}", where=uri, fix=_see(endpoint))


def no_such_bucket(uri: str) -> NotFoundError:
    """The error of any request to a bucket that is not there."""
    return NotFoundError("the bucket does not exist.", where=uri, fix="Check its name, or create it first.")


def _see(endpoint: str) -> str:
    return f"The endpoint is {endpoint}." if endpoint else ""


def _one_line(error: BaseException, hidden: Sequence[str]) -> str:
    # Signed addresses and credentials in addresses must not reach a log.
    text = re.sub(r"\?[^\s\"']*", "", " ".join(str(error).split()))
    for secret in hidden:
        text = text.replace(secret, "***")
    return re.sub(r"://[^/@\s]*@", "://", text).rstrip(".") + "."
