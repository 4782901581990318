"""Answer a prompt from a folder by Foundry Local, in an environment that has foundry-local-sdk and nothing of ours.

    python foundry_probe.py FOLDER PROMPT TOKENS

Prints JSON: the answer, and the versions of what gave it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version

from foundry_local_sdk import (
    CatalogType,
    ChatSession,
    Configuration,
    FoundryLocalManager,
    MessageItem,
    ModelInfoBuilder,
    Request,
    RequestOptions,
    SearchOptions,
)


def answer(folder: str, prompt: str, tokens: int) -> str:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        settings = Configuration(
            app_name="probe", app_data_dir=place, model_cache_dir=f"{place}/models", logs_dir=f"{place}/logs",
            disable_nonessential_telemetry=True,
        )  # fmt: skip
        FoundryLocalManager.initialize(settings)
        catalog = FoundryLocalManager.instance.get_catalog(CatalogType.LOCAL)
        with ModelInfoBuilder() as metadata:
            metadata.set_string_property("task", "chat-completion")
            model = catalog.register_model(model_path=folder, model_id="repacked-generic-cpu:1", metadata=metadata)
        model.load()
        with ChatSession(model) as session:
            session.set_options(RequestOptions(search=SearchOptions(temperature=0.0, max_output_tokens=tokens)))
            with Request().add_item(MessageItem.user(prompt)) as asked, session.process_request(asked) as response:
                text = "".join(part.text for item in response for part in item.parts)
        model.unload()
        return text


if __name__ == "__main__":
    packages = ("foundry-local-sdk", "onnxruntime", "onnxruntime-genai-core")
    said = answer(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    print(json.dumps({"answer": said, "versions": {name: version(name) for name in packages}}))
