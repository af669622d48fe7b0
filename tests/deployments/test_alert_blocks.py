"""The channels themselves, at real servers: what arrives, what is refused, and that no secret is ever told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.blocks.abstract import NotificationError
from pydantic import ValidationError

from configs.alerts import AlertMessage
from deployments import alert_blocks
from deployments.alert_blocks import MailAlert, Security, SlackAlert, WebhookAlert, deliver, target_of
from tests.receivers import MailReceiver, WebReceiver, make_certificate

REASON = 'it said "no":\n  <!channel> & {{ x }} \\ ' + "七" * 2000
MESSAGE = AlertMessage(
    kind="failed",
    train="lights_20261124_ab12",
    state="Failed",
    reason=REASON,
    scores={"base": {"accuracy": 12.5}, "tuned": {"accuracy": 90.0}},
    prefect="http://pages/run",
)
PASSWORD = "s3cret-pass"


@pytest.fixture
def web() -> Iterator[WebReceiver]:
    receiver = WebReceiver()
    yield receiver
    receiver.end()


def test_webhook_gets_the_message_as_valid_json(web: WebReceiver) -> None:
    answer = deliver(WebhookAlert(url=f"{web.address}/hook/k3y"), MESSAGE.model_dump_json())
    (body,) = web.at("/hook/k3y")
    assert AlertMessage.model_validate({name: body[name] for name in AlertMessage.model_fields}) == MESSAGE
    assert body["text"].startswith("Tuneline: lights_20261124_ab12 has failed\n")
    assert answer == "200 taken at /hook/k3y"


def test_slack_gets_text_whose_marks_call_nobody(web: WebReceiver) -> None:
    deliver(SlackAlert(url=f"{web.address}/s"), MESSAGE.model_dump_json())
    (body,) = web.at("/s")
    assert set(body) == {"text"}
    assert "&lt;!channel&gt; &amp;" in body["text"]
    assert "accuracy: base 12.5, tuned 90" in body["text"]


def test_words_of_somebodys_own_automation_are_sent_as_they_are(web: WebReceiver) -> None:
    deliver(WebhookAlert(url=web.address), "a queue is late", "Look")
    assert web.at("/") == [{"text": "Look\na queue is late"}]


def test_refusal_is_told_without_the_address(web: WebReceiver) -> None:
    web.status = 403
    with pytest.raises(NotificationError) as caught:
        deliver(WebhookAlert(url=f"{web.address}/hook/k3y"), MESSAGE.model_dump_json())
    assert "403 taken at /hook/k3y" in caught.value.log  # the receiver's own words, not ours
    assert web.address not in str(caught.getrepr(style="long"))
    assert len(web.posted) == 1  # refused is refused: it is not sent again


def test_receiver_that_is_away_is_tried_again_and_then_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alert_blocks, "_PAUSES", (0.01, 0.01))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers
        port = taken.getsockname()[1]
        for channel in (WebhookAlert(url=f"http://127.0.0.1:{port}/k3y"), _mail(port, "none", login=False)):
            with pytest.raises(NotificationError) as caught:
                deliver(channel, MESSAGE.model_dump_json())
            assert caught.value.log.startswith("the receiver cannot be reached")
            assert "k3y" not in caught.value.log


def test_receiver_that_comes_back_is_told_once(monkeypatch: pytest.MonkeyPatch, web: WebReceiver) -> None:
    port = web.server.server_port
    web.end()
    late: list[WebReceiver] = []

    def come_back(_seconds: float) -> None:
        late.append(WebReceiver(port))

    monkeypatch.setattr(alert_blocks.time, "sleep", come_back)
    deliver(WebhookAlert(url=f"http://127.0.0.1:{port}/x"), MESSAGE.model_dump_json())
    assert len(late[0].posted) == 1
    late[0].end()


@pytest.mark.parametrize("url", ["ops.example/x", "file:///etc/passwd", "http://", "https://h:99999/x", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="no address"):
        WebhookAlert(url=url)


# --- mail --------------------------------------------------------------------------------------------------


def _mail(port: int, security: Security, *, login: bool = True, host: str = "127.0.0.1") -> MailAlert:
    return MailAlert(
        host=host,
        port=port,
        security=security,
        sender="tuneline@lab.example",
        recipients=["a@lab.example", "b@lab.example"],
        username="tuner" if login else None,
        password=PASSWORD if login else None,
    )


@pytest.mark.parametrize("security", ["starttls", "ssl"])
def test_mail_arrives_over_tls_with_a_login(
    security: Security, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path, "127.0.0.1")
    receiver = MailReceiver(certificate, tls=security == "ssl", login=("tuner", PASSWORD))
    channel = _mail(receiver.port, security)
    try:
        with pytest.raises(NotificationError) as caught:  # nobody has said that this certificate is to be trusted
            deliver(channel, MESSAGE.model_dump_json())
        assert "CERTIFICATE_VERIFY_FAILED" in caught.value.log
        assert not receiver.mails
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert deliver(channel, MESSAGE.model_dump_json()).startswith("taken by 127.0.0.1")
    finally:
        receiver.end()
    (mail,) = receiver.mails
    assert mail["Subject"] == "Tuneline: lights_20261124_ab12 has failed"
    assert mail["To"] == "a@lab.example, b@lab.example"
    assert REASON in mail.get_content().replace("\r\n", "\n")


def test_wrong_password_is_told_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = MailReceiver(make_certificate(tmp_path, "127.0.0.1"), login=("tuner", "another"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    try:
        with pytest.raises(NotificationError) as caught:
            deliver(_mail(receiver.port, "starttls"), MESSAGE.model_dump_json())
    finally:
        receiver.end()
    assert "535" in caught.value.log
    assert PASSWORD not in caught.value.log
    assert not receiver.mails


def test_certificate_of_another_host_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = MailReceiver(make_certificate(tmp_path, "mail.example"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    try:
        with pytest.raises(NotificationError) as caught:
            deliver(_mail(receiver.port, "starttls", login=False), MESSAGE.model_dump_json())
    finally:
        receiver.end()
    assert "IP address mismatch" in caught.value.log


def test_password_does_not_go_over_the_network_in_clear() -> None:
    with pytest.raises(ValidationError, match="in clear"):
        _mail(25, "none", host="mail.lab.example")
    with pytest.raises(ValidationError, match="belong together"):
        MailAlert(host="h", port=25, sender="a@b", recipients=["c@d"], username="tuner")


def test_addresses_cannot_carry_headers() -> None:
    with pytest.raises(ValidationError, match="no mail address"):
        MailAlert(host="h", port=25, sender="a@b", recipients=["c@d\r\nBcc: e@f"])


def test_where_a_channel_sends_is_told_without_its_secret() -> None:
    assert target_of(WebhookAlert(url="https://user:pw@h.example:8443/k3y?t=1")) == "https://h.example:8443/…"
    assert PASSWORD not in target_of(_mail(587, "starttls")) + repr(_mail(587, "starttls"))
