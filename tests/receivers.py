"""Real receivers of alerts on loopback: a web server that keeps what is posted, an SMTP server that keeps mail."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session


class WebReceiver:
    """Keeps the JSON that is posted to each path; answers with `status`."""

    def __init__(self, port: int = 0) -> None:
        receiver = self
        self.posted: list[tuple[str, Any]] = []
        self.status = 200

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                receiver.posted.append((self.path, json.loads(body)))
                self.send_response(receiver.status)
                self.end_headers()
                self.wfile.write(f"taken at {self.path}".encode())

            def log_message(self, format: str, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def at(self, path: str) -> list[Any]:
        return [body for where, body in self.posted if where == path]

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class MailReceiver:
    """An SMTP server that takes mail after STARTTLS (or on TLS, or without either) and a login."""

    def __init__(
        self, certificate: Path | None = None, *, tls: bool = False, login: tuple[str, str] | None = None
    ) -> None:
        self.mails: list[EmailMessage] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        context = None
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
        starttls = context if not tls else None

        def check(server: SMTP, session: Session, envelope: Envelope, mechanism: str, given: Any) -> AuthResult:
            assert isinstance(given, LoginPassword)
            sent = (given.login.decode(), given.password.decode())
            return AuthResult(success=sent == login, handled=False)

        self.controller = Controller(
            self,
            hostname="127.0.0.1",
            port=self.port,
            ssl_context=context if tls else None,
            tls_context=starttls,
            require_starttls=starttls is not None,
            authenticator=check if login else None,
            auth_required=login is not None,
            auth_require_tls=starttls is not None,
        )
        self.controller.start()

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        mail = message_from_bytes(envelope.content or b"", policy=policy.default)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)
        return "250 taken"

    def end(self) -> None:
        self.controller.stop()


def make_certificate(folder: Path, host: str) -> Path:
    """A self-signed certificate for `host` with its key, in one file; made by the openssl program."""
    key, certificate, both = folder / "key.pem", folder / "cert.pem", folder / f"{host}.pem"
    name = f"IP:{host}" if host[0].isdigit() else f"DNS:{host}"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key)),
            *("-out", str(certificate), "-subj", "/CN=tuneline test", "-addext", f"subjectAltName={name}"),
        ],
        check=True,
        capture_output=True,
    )
    both.write_text(key.read_text() + certificate.read_text())
    return both
