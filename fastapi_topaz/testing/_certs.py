"""A certificate authority for tests, created on demand and not trusted elsewhere."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
import weakref
from typing import Self

import attrs

from fastapi_topaz._distribution import DISTRIBUTION


__all__ = ["Certificates"]


@attrs.frozen(weakref_slot=True, eq=False)
class Certificates:
    """
    A CA on disk and a server certificate in memory.

    Strictly private.
    """

    ca_path: str
    private_key: bytes = attrs.field(repr=False)
    chain: bytes = attrs.field(repr=False)

    @classmethod
    def issue(cls) -> Self:
        """
        Create a CA and a certificate for localhost and 127.0.0.1.

        The CA file is deleted with this object, at the latest when Python exits. It
        must exist while the server is stopped, because clients read it at every
        connect.

        Raises:
            ImportError: trustme is not installed.
        """
        try:
            import trustme  # noqa: PLC0415
        except ImportError as error:
            raise ImportError(
                f"tls=True needs trustme: pip install '{DISTRIBUTION}[testing]'"
            ) from error
        authority = trustme.CA()
        server = authority.issue_cert("localhost", "127.0.0.1")
        directory = tempfile.mkdtemp(prefix="fastapi-topaz-")
        path = pathlib.Path(directory, "ca.pem")
        path.write_bytes(authority.cert_pem.bytes())
        certificates = cls(
            str(path),
            server.private_key_pem.bytes(),
            b"".join(blob.bytes() for blob in server.cert_chain_pems),
        )
        weakref.finalize(certificates, shutil.rmtree, directory, ignore_errors=True)
        return certificates
