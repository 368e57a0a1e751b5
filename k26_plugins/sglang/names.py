"""Lists every name of SGLang that this adapter touches and that SGLang does not promise to keep.

tests/core/test_engine_names.py compares this table with the files of each checked release. docs/upgrading.md says what
to do when a release has lost one of the names. `since` and `until` are releases of SGLang itself; the test's snapshot
of KTransformers' fork says which names the fork has.
"""

from __future__ import annotations

from k26_plugins.common.adapters.engine import EngineName

# Values of `remove_when` that several entries share.
_SINCE = "neither a release below {} nor KTransformers' fork 0.7.2 is served"
_PLUGINS = "SGLang documents this registry for plugins, with a way to take a registration back"
_IN_TREE_MODEL = "no class of ours derives from it"
_MEDIA = "SGLang documents media processors for plugins, and what it hands them"
_ENCODER = "SGLang documents how a model's class prepares media in a server of the encoder alone"
_TOKEN_IDS = "SGLang's own parsers read token ids: a marker that the model quotes is then text by itself"
_CHATS = "SGLang's chats do the same"
_RESPONSES = "SGLang's Responses API does the same"
_MESSAGES = "SGLang's Messages API does the same"
_MARKERS = "SGLang leaves tokens out of a text that are not special to the tokenizer"
_SCHEME = "SGLang documents an interface for experts from outside"
_LOADER = "SGLang tells a model whether its weights are a whole checkpoint, and from which files they come"
_TORCH_NATIVE = "SGLang's plain torch backend runs MLA in its absorbed form"
_ARGUMENTS = "SGLang documents how a plugin reads the server's arguments"
_PLATFORM = "SGLang documents the question for plugins"
_PEER = "`k26 tune` compares with this kernel no more"

# --- the model's class and its configuration

MODEL_REGISTRY = EngineName(
    "sglang.srt.models.registry",
    "ModelRegistry",
    why="put its class in the place of the in-tree one",
    remove_when=_PLUGINS,
)
CONFIG_REGISTRY = EngineName(
    "sglang.srt.utils.hf_transformers.common",
    "_CONFIG_REGISTRY",
    why="have the core check a checkpoint's configuration where it is read",
    remove_when="SGLang lets a plugin register what checks a model's configuration",
    since="0.5.11",
)
CONFIG_REGISTRY_BEFORE = EngineName(
    "sglang.srt.utils.hf_transformers_utils",
    "_CONFIG_REGISTRY",
    why=CONFIG_REGISTRY.why,
    remove_when=_SINCE.format("0.5.11"),
    until="0.5.10.post1",
)
IN_TREE_CONFIG = EngineName(
    "sglang.srt.configs.kimi_k25",
    "KimiK25Config",
    why="keep SGLang's configuration class, with the core's check",
    remove_when=CONFIG_REGISTRY.remove_when,
)
IN_TREE_MODEL = EngineName(
    "sglang.srt.models.kimi_k25",
    "",
    why="derive its class of the model from the in-tree one",
    remove_when=_IN_TREE_MODEL,
)
IN_TREE_MODEL_CLASS = EngineName(
    IN_TREE_MODEL.module,
    "KimiK25ForConditionalGeneration",
    why="serve by the in-tree class all that the core does not define",
    remove_when=_IN_TREE_MODEL,
)
LANGUAGE_MODEL = EngineName(
    "sglang.srt.models.deepseek_v2",
    "DeepseekV3ForCausalLM",
    why="say which of the language model's layers are packed together",
    remove_when="the in-tree class says it of itself",
)
ROUTER_GATE = EngineName(
    "sglang.srt.models.deepseek_v2",
    "MoEGate",
    why="compute the router's logits in float32",
    remove_when="SGLang computes them in float32 on every device",
)
EMBEDDING_CACHE = EngineName(
    "sglang.srt.managers.mm_schedule",
    "embedding_cache",
    why="forget what the vision tower made of images once its weights were updated",
    remove_when="SGLang's flush after an update of the weights takes it in",
    since="0.5.18",
)
EMBEDDING_CACHE_BEFORE = EngineName(
    "sglang.srt.managers.mm_utils",
    "embedding_cache",
    why=EMBEDDING_CACHE.why,
    remove_when=_SINCE.format("0.5.18"),
    until="0.5.17",
)

# --- SGLang's plugins, its processes and their arguments

LOAD_PLUGINS = EngineName(
    "sglang.srt.plugins",
    "load_plugins",
    why="tell `k26 doctor` what a start would load",
    remove_when="SGLang has a command that lists the plugins it loaded",
    since="0.5.11",
)
HOOK_REGISTRY = EngineName(
    "sglang.srt.plugins.hook_registry",
    "HookRegistry",
    why="put its tokenizer in the place of the one that SGLang loads",
    remove_when=_PLUGINS,
    since="0.5.11",
)
HOOKS = EngineName(
    "sglang.srt.plugins.hook_registry",
    "HookRegistry._hooks",
    why="take its hook back where the registration fails half way",
    remove_when="SGLang's registry has a way to take a hook back",
    since="0.5.11",
)
HOOK_TYPE = EngineName(
    "sglang.srt.plugins.hook_registry",
    "HookType",
    why=HOOK_REGISTRY.why,
    remove_when=_PLUGINS,
    since="0.5.11",
)
FIRST_MODULE = EngineName(
    "sglang.srt.utils.hf_transformers_utils",
    "",
    # Every process of SGLang imports this module early, before anything that the adapter registers is used.
    why="begin where SGLang has no entry point for plugins (`boot`)",
    remove_when=_SINCE.format("0.5.11"),
)
HTTP_SERVER = EngineName(
    "sglang.srt.entrypoints.http_server",
    "",
    why="know an API server, without the imports of one elsewhere",
    remove_when="SGLang tells a plugin what its process is for",
)
RESOLVE_ARGUMENTS = EngineName(
    "sglang.srt.server_args",
    "ServerArgs.resolve_once",
    why="fill in parsers and runners of experts before SGLang settles its arguments",
    remove_when="SGLang asks a plugin for what a model's user left out",
    since="0.5.19",
)
RESOLVE_ARGUMENTS_BEFORE = EngineName(
    "sglang.srt.server_args",
    "ServerArgs.__post_init__",
    why=RESOLVE_ARGUMENTS.why,
    remove_when=_SINCE.format("0.5.19"),
)
GET_SERVER_ARGS = EngineName(
    "sglang.srt.runtime_context",
    "get_server_args",
    why="read what the user started SGLang with",
    remove_when=_ARGUMENTS,
    since="0.5.15",
)
GET_SERVER_ARGS_BEFORE = EngineName(
    "sglang.srt.server_args",
    "get_global_server_args",
    why=GET_SERVER_ARGS.why,
    remove_when=_SINCE.format("0.5.15"),
)
GET_SERVING = EngineName(
    "sglang.srt.runtime_context",
    "get_serving",
    why="know whether a chunk of an answer has what is new or everything so far",
    remove_when=_TOKEN_IDS,
    since="0.5.17",
)
IS_CUDA = EngineName(
    "sglang.srt.utils",
    "is_cuda",
    why="know whether SGLang runs on NVIDIA GPUs",
    remove_when=_PLATFORM,
)
GET_DEVICE = EngineName(
    "sglang.srt.utils",
    "get_device",
    why="know what SGLang runs on",
    remove_when=_PLATFORM,
)

# --- the tokenizer

GET_TOKENIZER = EngineName(
    "sglang.srt.utils.hf_transformers.tokenizer",
    "get_tokenizer",
    why="put its tokenizer in the place of the one that SGLang loads",
    remove_when="SGLang asks a registry which tokenizer an architecture has",
    since="0.5.11",
)
GET_TOKENIZER_BEFORE = EngineName(
    "sglang.srt.utils.hf_transformers_utils",
    "get_tokenizer",
    why=GET_TOKENIZER.why,
    remove_when=_SINCE.format("0.5.11"),
)
STOP_TOKEN_IDS = EngineName(
    "sglang.srt.utils.hf_transformers_utils",
    "attach_additional_stop_token_ids",
    why="do to its tokenizer what SGLang does to every one that it has loaded",
    remove_when=GET_TOKENIZER.remove_when,
)
PATCH_TOKENIZER = EngineName(
    "sglang.srt.utils.patch_tokenizer",
    "patch_tokenizer",
    why=STOP_TOKEN_IDS.why,
    remove_when=GET_TOKENIZER.remove_when,
)

# --- media

CUSTOMIZED_PROCESSORS = EngineName(
    "sglang.srt.multimodal.customized_mm_processor_utils",
    "_CUSTOMIZED_MM_PROCESSOR",
    why="build this model's processor without executing a file of the checkpoint",
    remove_when="SGLang lets a plugin register the processor of a model type",
)
IN_TREE_MEDIA = EngineName(
    "sglang.srt.multimodal.processors.kimi_k25",
    "",
    why="derive its class of the model's media from the in-tree one",
    remove_when=_IN_TREE_MODEL,
)
IN_TREE_MEDIA_CLASS = EngineName(
    IN_TREE_MEDIA.module,
    "KimiK2_5VLImageProcessor",
    why="take videos, and images as the core decodes them",
    remove_when=_MEDIA,
)
LOAD_SINGLE_ITEM = EngineName(
    IN_TREE_MEDIA.module,
    "KimiK2_5VLImageProcessor._load_single_item",
    why="decode images and videos by the core",
    remove_when=_MEDIA,
)
LOAD_SINGLE_ITEM_OF_BASE = EngineName(
    "sglang.srt.multimodal.processors.base_processor",
    "BaseMultimodalProcessor._load_single_item",
    why=LOAD_SINGLE_ITEM.why,
    remove_when="KTransformers' fork loads media by the method of the model's own class, as SGLang does",
)
PROCESSOR = EngineName(
    IN_TREE_MEDIA.module,
    "KimiK2_5VLImageProcessor._processor",
    why="cut videos by the checkpoint's settings, and put their chunks among a prompt's token ids",
    remove_when=_MEDIA,
)
GPU_CALL = EngineName(
    IN_TREE_MEDIA.module,
    "KimiGPUProcessorWrapper._gpu_call",
    why="have the core prepare pixels on every device",
    remove_when="SGLang prepares the same pixels with a GPU as without",
    since="0.5.11",
)
CPU_CALL = EngineName(
    IN_TREE_MEDIA.module,
    "KimiGPUProcessorWrapper._cpu_call",
    why=GPU_CALL.why,
    remove_when=GPU_CALL.remove_when,
    since="0.5.11",
)
GET_IMAGE_BYTES = EngineName(
    "sglang.srt.utils",
    "get_image_bytes",
    why="fetch an image as SGLang does",
    remove_when=_MEDIA,
)
NORMALIZE_VIDEO = EngineName(
    "sglang.srt.utils.common",
    "_normalize_video_input",
    why="fetch a video as SGLang does",
    remove_when=_MEDIA,
)
LOADED_IMAGE = EngineName(
    "sglang.srt.multimodal.processors.kimi_common",
    "KimiLoadedImage",
    why="hand over an image with its digest",
    remove_when=_MEDIA,
    since="0.5.23",
)
SNAPSHOT_MEDIA = EngineName(
    "sglang.srt.multimodal.cache",
    "snapshot_media",
    why="make the digest by which SGLang caches an image",
    remove_when=_MEDIA,
    since="0.5.18",
)
ENCODER_CONFIG = EngineName(
    "sglang.srt.multimodal.encoder_preprocessing",
    "EncoderMediaProcessorConfig",
    why="have a server of the encoder alone prepare its media in threads",
    remove_when=_ENCODER,
    since="0.5.18",
)
LOAD_ENCODER_ITEM = EngineName(
    "sglang.srt.disaggregation.encoder.preprocessor",
    "EncoderPreprocessor._load_single_item",
    why="open each medium that a server of the encoder alone is sent",
    remove_when=_ENCODER,
    since="0.5.19",
)

# --- the API server's chats, completions and answers

ASSISTANT_ARGUMENTS = EngineName(
    "sglang.srt.entrypoints.openai.serving_chat",
    "normalize_assistant_tool_call_arguments",
    why="keep a past call's arguments the text that the model wrote",
    remove_when=_CHATS,
    since="0.5.14",
)
LAST_MESSAGE = EngineName(
    "sglang.srt.entrypoints.openai.serving_chat",
    "OpenAIServingChat._handle_last_assistant_message",
    why="have the template render an answer that is to go on",
    remove_when="SGLang gives the template an assistant's last message",
)
HANDLE_CHAT = EngineName(
    "sglang.srt.entrypoints.openai.serving_chat",
    "OpenAIServingChat.handle_request",
    why="hear `name`, `reasoning` and `thinking` of a chat, and refuse what would end the server",
    remove_when="SGLang's classes of requests keep these fields, and its scheduler outlives the numbers that are refused",
)
ENGINE_PROMPT = EngineName(
    "sglang.srt.entrypoints.openai.serving_chat",
    "OpenAIServingChat._engine_prompt",
    why="send the token ids of a prompt with images",
    remove_when="SGLang tokenizes such a prompt once",
    since="0.5.20",
)
PROCESS_MESSAGES = EngineName(
    "sglang.srt.entrypoints.openai.serving_chat",
    "OpenAIServingChat._process_messages",
    why="show special tokens as the client asks, and allow calls beside a schema",
    remove_when="SGLang's parsers need no special token to be shown, and its grammar of a schema allows calls",
)
REASONING_HISTORY = EngineName(
    "sglang.srt.entrypoints.openai.serving_chat",
    "OpenAIServingChat.supports_native_reasoning_history",
    why="have past reasoning of the Messages API where the template writes it",
    remove_when="SGLang asks the template in use whether it writes past reasoning",
    since="0.5.19",
)
ENCODING_OUTPUT = EngineName(
    "sglang.srt.entrypoints.openai.serving_chat",
    "OpenAIServingChat._encoding_output",
    why="take answers apart by token ids, in which quoted markers are text",
    remove_when=_TOKEN_IDS,
    since="0.5.23",
)
EFFECTIVE_TOOLS = EngineName(
    "sglang.srt.entrypoints.openai.serving_chat",
    "OpenAIServingChat._effective_tools",
    why="know which tools an answer may call",
    remove_when=_TOKEN_IDS,
    since="0.5.17",
)
PARSES_CALLS = EngineName(
    "sglang.srt.entrypoints.openai.serving_chat",
    "OpenAIServingChat._tool_call_parsing_active",
    why="know whether calls are to be taken out of an answer",
    remove_when=_TOKEN_IDS,
    since="0.5.18",
)
COUNT_PAST_CALLS = EngineName(
    "sglang.srt.entrypoints.openai.serving_chat",
    "OpenAIServingChat._get_history_tool_calls_cnt",
    why="count the calls of a conversation, by which their ids are made",
    remove_when=_TOKEN_IDS,
)
CALL_ID = EngineName(
    "sglang.srt.entrypoints.openai.serving_chat",
    "OpenAIServingChat._process_tool_call_id",
    why="give a call its id",
    remove_when=_TOKEN_IDS,
)
RESPONSES_TOOLS = EngineName(
    "sglang.srt.entrypoints.openai.serving_responses",
    "OpenAIServingResponses._response_tools_to_chat_tools",
    why="know which tools an answer of the Responses API may call",
    remove_when=_TOKEN_IDS,
    since="0.5.14",
)
RESPONSES_PART = EngineName(
    "sglang.srt.entrypoints.openai.serving_responses",
    "OpenAIServingResponses._normalize_response_content_part_for_chat",
    why="keep images in results of the Responses API",
    remove_when=_RESPONSES,
    since="0.5.14",
)
RESPONSES_RESULT = EngineName(
    "sglang.srt.entrypoints.openai.serving_responses",
    "OpenAIServingResponses._flatten_tool_output",
    why="keep images in results of the Responses API",
    remove_when=_RESPONSES,
    since="0.5.20",
)
RESPONSES_TURNS = EngineName(
    "sglang.srt.entrypoints.openai.serving_responses",
    "OpenAIServingResponses._merge_consecutive_assistant_messages",
    why="keep the parts of a past turn of the Responses API together",
    remove_when=_RESPONSES,
    since="0.5.14",
)
CREATE_RESPONSES = EngineName(
    "sglang.srt.entrypoints.openai.serving_responses",
    "OpenAIServingResponses.create_responses",
    why="hear `thinking` in the Responses API",
    remove_when=_RESPONSES,
)
MESSAGES_REQUEST = EngineName(
    "sglang.srt.entrypoints.anthropic.serving",
    "AnthropicServing._convert_to_chat_completion_request",
    why="keep errors and the characters of past arguments in the Messages API",
    remove_when=_MESSAGES,
)
MESSAGES_ANSWER = EngineName(
    "sglang.srt.entrypoints.anthropic.serving",
    "AnthropicServing._convert_response",
    why="end a call that was cut as cut in the Messages API",
    remove_when=_MESSAGES,
)
COMPLETIONS = EngineName(
    "sglang.srt.entrypoints.openai.serving_completions",
    "OpenAIServingCompletion.__init__",
    why="hide markers in completions",
    remove_when=_MARKERS,
)
OLLAMA = EngineName(
    "sglang.srt.entrypoints.ollama.serving",
    "OllamaServing.__init__",
    why="hide markers in answers to Ollama's clients",
    remove_when=_MARKERS,
)
CHAT_RESPONSE = EngineName(
    "sglang.srt.entrypoints.openai.protocol",
    "ChatCompletionResponse",
    why="give an answer's reasoning the name that vLLM has for it, too",
    remove_when="SGLang sends `reasoning` beside `reasoning_content`",
)
FUNCTION_RESPONSE = EngineName(
    "sglang.srt.entrypoints.openai.protocol",
    "FunctionResponse",
    why="answer with a call",
    remove_when=_TOKEN_IDS,
)
TOOL_CALL = EngineName(
    "sglang.srt.entrypoints.openai.protocol",
    "ToolCall",
    why="answer with a call",
    remove_when=_TOKEN_IDS,
)
ANSWER_CHUNKS = EngineName(
    "sglang.srt.entrypoints.openai.chat_encoding_adapters",
    "token_output_sse_chunks",
    why="send an answer that was taken apart by token ids",
    remove_when=_TOKEN_IDS,
    since="0.5.23",
)
NEW_OUTPUT_IDS = EngineName(
    "sglang.srt.entrypoints.openai.chat_encoding_adapters",
    "select_new_output_ids",
    why="know the new token ids of a chunk",
    remove_when=_TOKEN_IDS,
    since="0.5.23",
)

# --- the parsers of calls, and the grammars of answers

TOOL_DETECTOR = EngineName(
    "sglang.srt.function_call.kimik2_detector",
    "KimiK2Detector",
    why="find calls in a text, whole or in pieces",
    remove_when=_TOKEN_IDS,
)
TOOL_PARSERS = EngineName(
    "sglang.srt.function_call.function_call_parser",
    "FunctionCallParser.ToolCallParserEnum",
    why="put its parser of calls in the place of SGLang's own for this model",
    remove_when="SGLang documents a registry of parsers for plugins",
)
CALL_PARSER = EngineName(
    "sglang.srt.function_call.function_call_parser",
    "FunctionCallParser",
    why="have SGLang's grammar of calls beside a schema",
    remove_when="SGLang's grammar of a schema allows the request's tools",
)
PARSE_RESULT = EngineName(
    "sglang.srt.function_call.core_types",
    "StreamingParseResult",
    why="hand over what was found in a text",
    remove_when=_TOKEN_IDS,
)
CALL_ITEM = EngineName(
    "sglang.srt.function_call.core_types",
    "ToolCallItem",
    why="hand over a call that was found in a text",
    remove_when=_TOKEN_IDS,
)
GRAMMAR_BACKEND = EngineName(
    "sglang.srt.constrained.base_grammar_backend",
    "create_grammar_backend",
    why="show compilers of grammars the token that ends this model's answers, and hide its control tokens",
    remove_when="SGLang asks a tokenizer for its control tokens and its end before it compiles a grammar",
)

# --- the core's experts in fused-MoE layers

COMPRESSED_TENSORS = EngineName(
    "sglang.srt.layers.quantization.compressed_tensors.compressed_tensors",
    "CompressedTensorsConfig",
    why="know a checkpoint that is quantized as the published one",
    remove_when=_SCHEME,
)
GET_MOE_SCHEME = EngineName(
    "sglang.srt.layers.quantization.compressed_tensors.compressed_tensors",
    "CompressedTensorsConfig.get_moe_scheme",
    why="give the INT4 checkpoint's fused-MoE layers its scheme",
    remove_when=_SCHEME,
)
MOE_SCHEME = EngineName(
    "sglang.srt.layers.quantization.compressed_tensors.schemes",
    "CompressedTensorsMoEScheme",
    why="create the experts' weights and compute with them",
    remove_when=_SCHEME,
)
COMBINE_INPUT = EngineName(
    "sglang.srt.layers.moe.token_dispatcher",
    "StandardCombineInput",
    why="hand over what the experts computed",
    remove_when=_SCHEME,
)
RUNNER_BACKEND = EngineName(
    "sglang.srt.layers.moe.utils",
    "get_moe_runner_backend",
    why="leave the experts to SGLang where the user or SGLang chose a runner",
    remove_when=_SCHEME,
)
ALL_TO_ALL_BACKEND = EngineName(
    "sglang.srt.layers.moe.utils",
    "get_moe_a2a_backend",
    why="know how tokens come to the ranks of their experts",
    remove_when=_SCHEME,
)
KT_CONFIG = EngineName(
    "sglang.srt.layers.moe.fused_moe_triton.layer",
    "create_kt_config_from_server_args",
    why="build fused-MoE layers without KTransformers' wrapper in a hybrid run",
    remove_when="SGLang asks a quantization method whether it is to be wrapped",
)
KT_SWITCH = EngineName(
    "sglang.srt.layers.moe.utils",
    "speculative_kt_ep_disabled_context",
    # KTransformers' fork has this function since 0.7, for draft models.
    why=KT_CONFIG.why,
    remove_when="KTransformers' fork 0.7.2 is not served",
    since="sglang-kt 0.7.2",
)
BATCH_RESULT = EngineName(
    "sglang.srt.managers.scheduler",
    "Scheduler.process_batch_result",
    why="end a hybrid run whose CPU failed before a step's tokens are given to their requests",
    remove_when="SGLang tells a model before it uses the tokens of a step",
)

# --- loading, saving and LoRA

OBJECT_STORE = EngineName(
    "sglang.srt.utils.runai_utils",
    "ObjectStorageModel",
    why="find the small files of a model in an object store",
    remove_when="SGLang hands a model the folder of its small files",
)
IN_OBJECT_STORE = EngineName(
    "sglang.srt.utils.runai_utils",
    "is_runai_obj_uri",
    why=OBJECT_STORE.why,
    remove_when=OBJECT_STORE.remove_when,
)
LOAD_CHECKPOINT = EngineName(
    "sglang.srt.model_loader.loader",
    "DefaultModelLoader.load_weights_and_postprocess",
    # Only the loader knows that its tensors are a whole checkpoint: an update from tensors calls a model's
    # `load_weights` with parts of one.
    why="account for the tensors of a whole checkpoint",
    remove_when=_LOADER,
)
SAFETENSORS_ITERATOR = EngineName(
    "sglang.srt.model_loader.weight_utils",
    "safetensors_weights_iterator",
    why="read the checkpoint's files with the core's threads",
    remove_when=_LOADER,
)
BUFFERED_ITERATOR = EngineName(
    "sglang.srt.model_loader.weight_utils",
    "buffered_multi_thread_safetensors_weights_iterator",
    why=SAFETENSORS_ITERATOR.why,
    remove_when=_LOADER,
)
SAVE_MODEL = EngineName(
    "sglang.srt.model_loader.loader",
    "ShardedStateLoader.save_model",
    why="save experts as the checkpoint packs them",
    remove_when="SGLang tells a quantization method when a running model is saved",
)
LORA_WEIGHT = EngineName(
    "sglang.srt.lora.lora",
    "LoRAAdapter._process_weight",
    why="refuse an adapter on routed experts beside the core's",
    remove_when="SGLang asks the model's class which modules take adapters",
)

# --- MLA on SGLang's plain torch backend

TORCH_NATIVE = EngineName(
    "sglang.srt.layers.attention.torch_native_backend",
    "TorchNativeAttnBackend",
    why="compute MLA on the plain torch backend at the cost of the new tokens",
    remove_when=_TORCH_NATIVE,
)
SDPA_EXTEND = EngineName(
    "sglang.srt.layers.attention.torch_native_backend",
    "TorchNativeAttnBackend._run_sdpa_forward_extend",
    why=TORCH_NATIVE.why,
    remove_when=_TORCH_NATIVE,
)
SDPA_DECODE = EngineName(
    "sglang.srt.layers.attention.torch_native_backend",
    "TorchNativeAttnBackend._run_sdpa_forward_decode",
    why=TORCH_NATIVE.why,
    remove_when=_TORCH_NATIVE,
)
ATTENTION_BACKENDS = EngineName(
    "sglang.srt.layers.attention.attention_registry",
    "ATTENTION_BACKENDS",
    why=TORCH_NATIVE.why,
    remove_when=_TORCH_NATIVE,
)
FORWARD_REGISTRY = EngineName(
    "sglang.srt.models.deepseek_common.attention_backend_handler",
    "AttentionBackendRegistry",
    # The plain torch backend can run no other form of MLA, because the other form has keys and values of two sizes.
    why="have the plain torch backend run MLA in its absorbed form",
    remove_when=_TORCH_NATIVE,
)
FORWARD_METHOD = EngineName(
    "sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods",
    "AttnForwardMethod",
    why=FORWARD_REGISTRY.why,
    remove_when=_TORCH_NATIVE,
)

# --- kernels that `k26 tune` times beside the core's

FUSED_MARLIN_MOE = EngineName(
    "sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe",
    "fused_marlin_moe",
    why="time SGLang's Marlin kernel",
    remove_when=_PEER,
)
MARLIN_REPACK = EngineName(
    "sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16_moe",
    "gptq_marlin_moe_repack",
    why="time SGLang's Marlin kernel",
    remove_when=_PEER,
)
MARLIN_WORKSPACE = EngineName(
    "sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16_moe",
    "marlin_make_workspace",
    why="time SGLang's Marlin kernel",
    remove_when=_PEER,
    since="0.5.13",
)
MARLIN_PERMUTE_SCALES = EngineName(
    "sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16_moe",
    "marlin_moe_permute_scales",
    why="time SGLang's Marlin kernel",
    remove_when=_PEER,
)
FUSED_EXPERTS = EngineName(
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe",
    "fused_experts",
    why="time SGLang's Triton kernel",
    remove_when=_PEER,
    since="0.5.11",
)
MOE_RUNNER_CONFIG = EngineName(
    "sglang.srt.layers.moe.moe_runner.base",
    "MoeRunnerConfig",
    why="time SGLang's Triton kernel",
    remove_when=_PEER,
)
TOPK_OUTPUT = EngineName(
    "sglang.srt.layers.moe.topk",
    "StandardTopKOutput",
    why="time SGLang's Triton kernel",
    remove_when=_PEER,
)
MXINT4 = EngineName(
    "sglang.srt.layers.quantization.compressed_tensors.schemes",
    "CompressedTensorsMxInt4MoE",
    why="time FlashInfer's experts as SGLang runs them",
    remove_when=_PEER,
)
ROUTING_METHOD = EngineName(
    "sglang.srt.layers.moe.utils",
    "RoutingMethodType",
    why="time FlashInfer's experts as SGLang runs them",
    remove_when=_PEER,
)
SERVER_ARGS = EngineName(
    "sglang.srt.server_args",
    "ServerArgs",
    why="give SGLang's kernels the settings that they read of a server",
    remove_when=_PEER,
)
SET_SERVER_ARGS = EngineName(
    "sglang.srt.server_args",
    "set_global_server_args_for_scheduler",
    why="give SGLang's kernels the settings that they read of a server",
    remove_when=_PEER,
)
INIT_DISTRIBUTED = EngineName(
    "sglang.srt.distributed.parallel_state",
    "init_distributed_environment",
    why="give SGLang's kernels the groups of a single rank",
    remove_when=_PEER,
)
INIT_PARALLEL = EngineName(
    "sglang.srt.distributed.parallel_state",
    "initialize_model_parallel",
    why="give SGLang's kernels the groups of a single rank",
    remove_when=_PEER,
)
