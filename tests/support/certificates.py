"""Real certificates for tests: an authority, and what it signs."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dtrain.runtime.tls import Role, TlsFiles, agent_server_name, coordinator_server_name

DAY_S = 86_400.0


@dataclass(frozen=True)
class Authority:
    """A CA in ``folder``."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def file(self) -> Path:
        return self.folder / "ca.pem"

    def issue(
        self,
        role: Role | str,
        name: str,
        *,
        cluster: str = "c1",
        uris: tuple[str, ...] | None = None,
        dns: tuple[str, ...] | None = None,
        valid_s: float = 365 * DAY_S,
        file: str = "",
    ) -> TlsFiles:
        """Sign a certificate and return its files; ``uris`` and ``dns`` instead of the right ones."""
        role = Role(role)
        if uris is None:
            uris = (f"dtrain://{cluster}/{role.value}/{name}",)
        if dns is None:
            dns = {
                Role.COORDINATOR: (coordinator_server_name(cluster),),
                Role.AGENT: (agent_server_name(cluster, name),),
            }.get(role, ())
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        names = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(seconds=min(-60.0, valid_s - 60.0)))
            .not_valid_after(now + datetime.timedelta(seconds=valid_s))
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        signed = builder.sign(self.key, hashes.SHA256())
        base = self.folder / (file or f"{role.value}-{name}")
        cert, secret = base.with_suffix(".pem"), base.with_suffix(".key")
        write(cert, signed.public_bytes(serialization.Encoding.PEM))
        write(secret, _pem(key))
        secret.chmod(0o600)
        return TlsFiles(str(cert), str(secret), str(self.file))


def authority(folder: Path) -> Authority:
    """Make a CA."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test CA {folder.name}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    made = Authority(folder, key, certificate)
    write(made.file, certificate.public_bytes(serialization.Encoding.PEM))
    return made


def write(path: Path, data: bytes) -> None:
    """Replace a file in one step, as tools that rotate certificates do."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(data)
    fresh.replace(path)


def arguments(files: TlsFiles) -> list[str]:
    """The flags that name ``files``."""
    return ["--tls-cert", files.cert, "--tls-key", files.key, "--tls-cacert", files.cacert]


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
