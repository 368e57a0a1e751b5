"""Find out which engine answers at an address, and connect to it."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

import httpx

from k26_plugins.operate.verify.endpoint import Endpoint, EndpointError, get_json
from k26_plugins.operate.verify.openai import OpenAIEndpoint
from k26_plugins.operate.verify.sglang import SGLangEndpoint
from k26_plugins.operate.verify.vllm import VLLMEndpoint


def asks_environment(url: str) -> bool:
    """Return whether to use the environment's proxies for this address.

    They are never used for this machine itself, nor for hosts that NO_PROXY names.
    """
    host = urlsplit(url).hostname or ""
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host == "localhost" or host.endswith(".localhost")
    return not is_here and not proxy_bypass(host)


def connect(url: str, model: str | None = None, api_key: str | None = None, timeout: float = 300.0) -> Endpoint:
    """Ask the server which engine it runs, and return the endpoint that asks this engine in its own way.

    url: with or without /v1 at the end. model: needed if the server has several. timeout: seconds of a request. Raises
    EndpointError if the server does not answer as an OpenAI-compatible one, if several models are served and none is
    named, or if the environment's proxy cannot be used.
    """
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        client = httpx.Client(timeout=timeout, headers=headers, trust_env=asks_environment(url))
    except (ImportError, ValueError) as error:
        # httpx reads the environment's proxies here; for a SOCKS proxy it may say that a package is missing.
        raise EndpointError(
            f"the proxy in the environment (ALL_PROXY, HTTP_PROXY, HTTPS_PROXY) cannot be used: {error} Unset it, name the "
            f"server in NO_PROXY, or install what it needs: pip install 'httpx[socks]'."
        ) from error
    try:
        models = client.get(f"{url}/v1/models")
        served = [entry["id"] for entry in models.json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise EndpointError(
            f"{url}/v1/models does not answer as an OpenAI-compatible server ({error or type(error).__name__}): "
            f"give the address before /v1, such as http://localhost:8000, and --api-key where it wants one."
        ) from error
    if model is None and len(served) != 1:
        raise EndpointError(f"{url} serves {len(served)} models ({', '.join(served[:8])}): choose with --model.")
    name = model or served[0]
    version = get_json(client, f"{url}/version").get("version")
    if version:
        return VLLMEndpoint(url, name, client, f"vLLM {version}", renders_images=True)
    for path in ("server_info", "get_server_info"):
        version = get_json(client, f"{url}/{path}").get("version")
        if version:
            return SGLangEndpoint(url, name, client, f"SGLang {version}")
    return OpenAIEndpoint(url, name, client, "an OpenAI-compatible server", reports_prompt=False)
