"""Servers on the cluster are asked directly, whatever proxy the environment names; hosted ones through it."""

import pytest

pytest.importorskip("httpx")

from megatron_dagger.policies.base import PolicyGone
from megatron_dagger.policies.openai.proxies import direct_mounts, is_near
from tests.unit.policies.openai.teachers import act, state, teacher
from tools.support.chat_server import chat_server

NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize("host", ["localhost", "node17", "127.0.0.1", "10.2.0.7", "192.168.1.1", "::1", "fd00::5"])
def test_a_clusters_own_hosts_are_near(host):
    assert is_near(host)


@pytest.mark.parametrize("host", ["api.example.com", "8.8.8.8", "2606:4700::1111", ""])
def test_hosts_of_the_internet_are_not(host):
    assert not is_near(host)


def test_mounts_name_near_hosts_only():
    urls = ("http://node1:8000/v1", "http://[::1]:8000/v1", "https://api.example.com/v1", "http://NODE1:8001/v1")
    assert direct_mounts(urls) == {"all://[::1]": None, "all://node1": None}


def test_a_proxy_in_the_environment_never_sees_a_request_to_a_server_on_this_node(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, NOWHERE)
    with chat_server(lambda request: "a") as server, teacher(tmp_path, server, patience_s=2.0) as policy:
        act(policy, state("1"))
    assert len(server.requests) == 1


def test_a_hosted_server_is_asked_through_the_proxy(tmp_path, monkeypatch):
    with chat_server(lambda request: "a") as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        hosted = type("Hosted", (), {"url": "http://api.example.com/v1"})()
        with teacher(tmp_path, hosted) as policy, pytest.raises(PolicyGone, match="404"):  # this proxy knows no hosts
            act(policy, state("1"))
        assert [headers["Host"] for headers in proxy.headers] == ["api.example.com"]
