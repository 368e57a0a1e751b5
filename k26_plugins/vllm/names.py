"""Lists every name of vLLM that this adapter touches and that vLLM does not promise to keep.

tests/core/test_engine_names.py compares this table with the files of each checked release. docs/upgrading.md says what
to do when a release has lost one of the names.
"""

from __future__ import annotations

from k26_plugins.common.adapters.engine import EngineName

# Values of `remove_when` that several entries share.
_REGISTRY = "vLLM documents this registry for plugins, with a way to take a registration back"
_IN_TREE_MODEL = "no class of ours derives from it"
_IN_TREE_PARSER = "vLLM's own parsers read token ids: a marker that the model quotes is then text by itself"
_MODULAR = "vLLM documents an interface for experts from outside"
_METHOD = "vLLM documents an interface for quantization methods of fused-MoE layers from outside"
_MEDIA = "vLLM documents media connectors and their parts for plugins"
_MESSAGES = "vLLM's Messages API does the same"
_MARKERS = "vLLM leaves tokens out of a completion that are not special to the tokenizer"
_THINKING = "vLLM makes one value of a request's `thinking`, in each of its forms, and of its effort of reasoning"
_LOADER = "vLLM tells a model whether its weights are a whole checkpoint, and from which files they come"
_PREFILL_ON_CPU = "vLLM's own prefill on a CPU takes memory that grows with a prompt's length and not with its square"
_NO_ADAPTER_ON_CPU = "no release below 0.33 is served: from there on vLLM leaves tokens without adapter alone"
_PEER = "`k26 tune` compares with this kernel no more"

# --- the model's class and its configuration

MODEL_REGISTRY = EngineName(
    "vllm.model_executor.models.registry",
    "ModelRegistry",
    why="put its class in the place of the in-tree one",
    remove_when=_REGISTRY,
)
MODELS_CONFIG_MAP = EngineName(
    "vllm.model_executor.models.config",
    "MODELS_CONFIG_MAP",
    why="be called at the end of this architecture's configuration",
    remove_when="vLLM lets a plugin register what checks a model's configuration",
)
CONFIG_HOOK = EngineName(
    "vllm.model_executor.models.config",
    "VerifyAndUpdateConfig",
    why="be called at the end of this architecture's configuration",
    remove_when=MODELS_CONFIG_MAP.remove_when,
)
GET_MODEL_ARCH_CONFIG = EngineName(
    "vllm.config",
    "ModelConfig.get_model_arch_config",
    # CONFIG_HOOK comes too late: vLLM has then already built a tokenizer, to learn which media the model takes.
    why="choose the tokenizer once the checkpoint's configuration is read and before one is built",
    remove_when="vLLM asks a registry which tokenizer an architecture has",
)
LOAD_GENERAL_PLUGINS = EngineName(
    "vllm.plugins",
    "load_general_plugins",
    why="tell `k26 doctor` what a start would load",
    remove_when="vLLM has a command that lists the plugins it loaded",
)
IN_TREE_MODEL = EngineName(
    "vllm.model_executor.models.kimi_k25",
    "",
    why="derive its classes of the model and of its media from the in-tree ones",
    remove_when=_IN_TREE_MODEL,
)
IN_TREE_MODEL_CLASS = EngineName(
    IN_TREE_MODEL.module,
    "KimiK25ForConditionalGeneration",
    why="serve by the in-tree class all that the core does not define",
    remove_when=_IN_TREE_MODEL,
)
IN_TREE_DUMMY_INPUTS = EngineName(
    IN_TREE_MODEL.module,
    "KimiK25DummyInputsBuilder",
    why="register its class' media with the in-tree sizes for vLLM's profiling",
    remove_when=_IN_TREE_MODEL,
)
IN_TREE_PROCESSING_INFO = EngineName(
    IN_TREE_MODEL.module,
    "KimiK25ProcessingInfo",
    why="prepare images by the core",
    remove_when=_IN_TREE_MODEL,
)
IN_TREE_MEDIA_PROCESSOR = EngineName(
    IN_TREE_MODEL.module,
    "KimiK25MultiModalProcessor",
    why="take videos, which vLLM's rendering asks this class about",
    remove_when="the in-tree class takes videos",
)
MULTIMODAL_REGISTRY = EngineName(
    "vllm.multimodal",
    "MULTIMODAL_REGISTRY",
    why="register its class' media",
    remove_when=_IN_TREE_MODEL,
)
CURRENT_PLATFORM = EngineName(
    "vllm.platforms",
    "current_platform",
    why="know whether vLLM runs on a CPU",
    remove_when="vLLM tells a model its platform, or documents the question",
)

# --- the command line and the tokenizer

FROM_CLI_ARGS = EngineName(
    "vllm.engine.arg_utils",
    "AsyncEngineArgs.from_cli_args",
    # vLLM's registry of models does not say which parsers of answers a model has.
    why="keep the command line's flags beside the engine's arguments, to fill in the parsers of answers",
    remove_when="vLLM asks a registry which parsers an architecture has where the user named none",
)
CREATE_MODEL_CONFIG = EngineName(
    "vllm.engine.arg_utils",
    "AsyncEngineArgs.create_model_config",
    # Earlier only vLLM knows which model a name stands for: the name may be ModelScope's or an object store's.
    why="fill in the parsers of answers where an API server has come to know its model",
    remove_when=FROM_CLI_ARGS.remove_when,
)
TOKENIZER_REGISTRY = EngineName(
    "vllm.tokenizers.registry",
    "TokenizerRegistry",
    why="add the tokenizer mode `k26`",
    remove_when=_REGISTRY,
)
RENDERER_REGISTRY = EngineName(
    "vllm.renderers.registry",
    "RENDERER_REGISTRY",
    why="add the rendering of chats that goes with the tokenizer mode `k26`",
    remove_when=_REGISTRY,
)
CACHED_TOKENIZER = EngineName(
    "vllm.tokenizers.hf",
    "get_cached_tokenizer",
    why="give its tokenizer the attributes that vLLM reads many times a request",
    remove_when="vLLM does it to what a registered tokenizer mode returns",
)
HF_RENDERER = EngineName(
    "vllm.renderers.hf",
    "HfRenderer",
    why="mark control tokens in messages before anything is put into them",
    remove_when="vLLM tells text that a client sent from the template's when it tokenizes a chat",
)
MODELSCOPE_DOWNLOAD = EngineName(
    "vllm.model_executor.model_loader.weight_utils",
    "maybe_download_from_modelscope",
    why="find the small files of a model that is named on ModelScope",
    remove_when="vLLM hands a model the folder of its small files",
)

# --- the parsers of answers, and their grammars

TOOL_PARSERS = EngineName(
    "vllm.tool_parsers",
    "ToolParserManager",
    why="add the parser `k26` of tool calls",
    remove_when=_REGISTRY,
)
REASONING_PARSERS = EngineName(
    "vllm.reasoning",
    "ReasoningParserManager",
    why="add the parser `k26` of reasoning",
    remove_when=_REGISTRY,
)
KIMI_PARSER = EngineName(
    "vllm.parser.kimi_k2",
    "",
    # vLLM 0.19.1 has another tool-call parser under the same name.
    why="know whether vLLM has the parser that the core's mends",
    remove_when="no release below 0.25 is served",
    since="0.25.0",
)
GET_PARSER = EngineName(
    "vllm.parser.parser_manager",
    "ParserManager.get_parser",
    why="make one parser of the two `k26`, where vLLM composes one of them",
    remove_when="vLLM has a registry of composed parsers",
)
DELEGATING_PARSER = EngineName(
    "vllm.parser.abstract_parser",
    "DelegatingParser",
    why="be a parser of whole answers",
    remove_when=_IN_TREE_PARSER,
)
APPLY_STRUCTURAL_TAG = EngineName(
    "vllm.parser.abstract_parser",
    "DelegatingParser._apply_structural_tag",
    why="hold answers with calls and a schema to one grammar",
    remove_when=_IN_TREE_PARSER,
    since="0.24.0",
)
DELTA_MESSAGE = EngineName(
    "vllm.parser.abstract_parser",
    "DeltaMessage",
    why="hand over a piece of an answer",
    remove_when=_IN_TREE_PARSER,
)
FUNCTION_CALL = EngineName(
    "vllm.parser.abstract_parser",
    "FunctionCall",
    why="hand over a whole call",
    remove_when=_IN_TREE_PARSER,
)
DELTA_FUNCTION_CALL = EngineName(
    "vllm.parser.kimi_k2",
    "DeltaFunctionCall",
    why="hand over a piece of a call",
    remove_when=_IN_TREE_PARSER,
    since="0.25.0",
)
DELTA_TOOL_CALL = EngineName(
    "vllm.parser.kimi_k2",
    "DeltaToolCall",
    why="hand over a piece of a call",
    remove_when=_IN_TREE_PARSER,
    since="0.25.0",
)
COUNT_INVOCATION = EngineName(
    "vllm.parser.metrics",
    "record_tool_parser_invocation",
    why="count answers with calls in /metrics as vLLM's own parsers do",
    remove_when="vLLM counts them where it calls a parser",
    since="0.24.0",
)
KIMI_TOOL_PARSER = EngineName(
    "vllm.tool_parsers.kimi_k2_tool_parser",
    "KimiK2ToolParser",
    why="stand beside another's parser of reasoning, and for structural tags",
    remove_when=_IN_TREE_PARSER,
)
KIMI_REASONING_PARSER = EngineName(
    "vllm.reasoning.kimi_k2_reasoning_parser",
    "KimiK2ReasoningParser",
    why="stand beside another's parser of tool calls, and in the engine's process",
    remove_when=_IN_TREE_PARSER,
)
GRAMMAR_TOKENIZER = EngineName(
    "vllm.v1.structured_output",
    "cached_tokenizer_from_config",
    why="show compilers of grammars the token that ends this model's answers, and hide its control tokens",
    remove_when="vLLM asks a tokenizer for its control tokens and its end before it compiles a grammar",
)
TOOL_STRICT_LEVEL = EngineName(
    "vllm.tool_parsers.tool_strict_level",
    "ToolStrictLevel",
    why="allow calls beside a schema of the answer",
    remove_when="vLLM's grammar of an answer's schema allows the request's tools by default",
    since="0.31.0",
)

# --- the API server's chats and completions

CHAT_PARAMS = EngineName(
    "vllm.entrypoints.openai.chat_completion.protocol",
    "ChatCompletionRequest.build_chat_params",
    why="hear `thinking` in every form",
    remove_when=_THINKING,
)
RESPONSES_CHAT_PARAMS = EngineName(
    "vllm.entrypoints.openai.responses.protocol",
    "ResponsesRequest.build_chat_params",
    why="hear `thinking` in every form",
    remove_when=_THINKING,
)
TOKENIZE_CHAT_PARAMS = EngineName(
    "vllm.entrypoints.serve.tokenize.protocol",
    "TokenizeChatRequest.build_chat_params",
    why="hear `thinking` in every form",
    remove_when=_THINKING,
)
CREATE_TOKENIZE = EngineName(
    "vllm.entrypoints.serve.tokenize.serving",
    "ServingTokenization.create_tokenize",
    why="read `reasoning_content` of what is to be tokenized",
    remove_when="vLLM's /tokenize takes the same messages as its chats",
    since="0.24.0",
)
CREATE_TOKENIZE_BEFORE = EngineName(
    "vllm.entrypoints.serve.tokenize.serving",
    "OpenAIServingTokenization.create_tokenize",
    why=CREATE_TOKENIZE.why,
    remove_when="no release below 0.24 is served",
    until="0.23.0",
)
CHAT_MESSAGE = EngineName(
    "vllm.entrypoints.openai.chat_completion.protocol",
    "ChatMessage.__init__",
    why="give an answer's reasoning the name that Moonshot's API has for it, too",
    remove_when="vLLM sends `reasoning_content` beside `reasoning`",
)
CHAT_ANSWER = EngineName(
    "vllm.entrypoints.openai.chat_completion.serving",
    "OpenAIServingChat.chat_completion_full_generator",
    why="end an answer that the token limit cut within a call as cut",
    remove_when="vLLM says `length` of such an answer, as it does where it is streamed",
)
COMPLETION_STREAM = EngineName(
    "vllm.entrypoints.openai.completion.serving",
    "OpenAIServingCompletion.completion_stream_generator",
    why="hide markers in streamed completions",
    remove_when=_MARKERS,
)
COMPLETION = EngineName(
    "vllm.entrypoints.openai.completion.serving",
    "OpenAIServingCompletion.request_output_to_completion_response",
    why="hide markers in completions",
    remove_when=_MARKERS,
)
MESSAGES_IMAGE = EngineName(
    "vllm.entrypoints.anthropic.serving",
    "AnthropicServingMessages._convert_image_source_to_url",
    why="keep the images of a result in the Messages API",
    remove_when=_MESSAGES,
)
MESSAGES_CALL = EngineName(
    "vllm.entrypoints.anthropic.serving",
    "AnthropicServingMessages._convert_tool_use_block",
    why="keep the characters of past arguments in the Messages API",
    remove_when=_MESSAGES,
)
MESSAGES_RESULT = EngineName(
    "vllm.entrypoints.anthropic.serving",
    "AnthropicServingMessages._convert_user_tool_result",
    why="keep a result's images and that it is an error in the Messages API",
    remove_when=_MESSAGES,
)
MESSAGES_ANSWER = EngineName(
    "vllm.entrypoints.anthropic.serving",
    "AnthropicServingMessages.messages_full_converter",
    why="answer with a call that the token limit cut in the Messages API",
    remove_when=_MESSAGES,
)
RESPONSES_EVENTS = EngineName(
    "vllm.entrypoints.openai.responses.api_router",
    "_convert_stream_to_sse_events",
    why="end a stream of the Responses API that the token limit cut as incomplete",
    remove_when="vLLM sends `response.incomplete`",
)

# --- media

ENVS = EngineName(
    "vllm",
    "envs",
    why="hold to the limits that vLLM's user set for media",
    remove_when=_MEDIA,
)
MEDIA_CONNECTORS = EngineName(
    "vllm.multimodal.media",
    "MEDIA_CONNECTOR_REGISTRY",
    why="fetch and decode the media of requests",
    remove_when=_MEDIA,
)
MEDIA_CONNECTOR = EngineName(
    "vllm.multimodal.media",
    "MediaConnector",
    why="fetch media as vLLM does and decode them as the core does",
    remove_when=_MEDIA,
)
LOAD_DATA_URL = EngineName(
    "vllm.multimodal.media",
    "MediaConnector._load_data_url",
    why="read `data:` URLs in every form of base64",
    remove_when="vLLM reads `data:` URLs as RFC 2397 has them",
)
MEDIA_WITH_BYTES = EngineName(
    "vllm.multimodal.media",
    "MediaWithBytes",
    why="hand over an image with the bytes by which vLLM caches it",
    remove_when=_MEDIA,
)
MEDIA_IO = EngineName(
    "vllm.multimodal.media.base",
    "MediaIO",
    why="read a video",
    remove_when=_MEDIA,
)
IMAGE_IO = EngineName(
    "vllm.multimodal.media.image",
    "ImageMediaIO",
    why="read an image as the model's preprocessing does",
    remove_when="vLLM neither turns images by EXIF nor fills their ground for this model, and refuses bombs with 400",
)
PROCESSING_INFO = EngineName(
    "vllm.multimodal.processing",
    "BaseProcessingInfo",
    # The in-tree class's own constructor loads the checkpoint's image processor.
    why="describe this model's media without executing a file of the checkpoint",
    remove_when="the in-tree class executes none in any release that is served",
)
KIMI_PROCESSOR = EngineName(
    "vllm.transformers_utils.processors.kimi_k25",
    "KimiK25Processor",
    why="put its tokenizer and its image processor together as vLLM does",
    remove_when="the in-tree class takes an image processor that it is given",
)

# --- the core's experts in fused-MoE layers

COMPRESSED_TENSORS = EngineName(
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "CompressedTensorsConfig",
    why="give the INT4 checkpoint's fused-MoE layers its method",
    remove_when="vLLM lets a plugin register a method for the routed experts of one model",
)
FUSED_MOE_METHOD = EngineName(
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base",
    "FusedMoEMethodBase",
    why="create the experts' weights and compute with them",
    remove_when=_METHOD,
)
FUSED_MOE_CONFIG = EngineName(
    "vllm.model_executor.layers.fused_moe.config",
    "FusedMoEConfig",
    why="know the sizes of a layer's experts",
    remove_when=_METHOD,
)
UNQUANTIZED = EngineName(
    "vllm.model_executor.layers.fused_moe.config",
    "FUSED_MOE_UNQUANTIZED_CONFIG",
    why="say that activations are not quantized",
    remove_when=_METHOD,
)
BATCHED_FORM = EngineName(
    "vllm.model_executor.layers.fused_moe.config",
    "FusedMoEParallelConfig.use_batched_activation_format",
    why="know whether each expert gets its tokens in a buffer of its own",
    remove_when=_METHOD,
)
SUPPORTS_DEVICE = EngineName(
    "vllm.model_executor.layers.fused_moe",
    "modular_kernel.FusedMoEExpertsModular._supports_current_device",
    why="be a class that vLLM's modular kernel could choose",
    remove_when=_MODULAR,
)
SUPPORTS_NO_ACT_AND_MUL = EngineName(
    "vllm.model_executor.layers.fused_moe",
    "modular_kernel.FusedMoEExpertsModular._supports_no_act_and_mul",
    why=SUPPORTS_DEVICE.why,
    remove_when=_MODULAR,
)
SUPPORTS_QUANT_SCHEME = EngineName(
    "vllm.model_executor.layers.fused_moe",
    "modular_kernel.FusedMoEExpertsModular._supports_quant_scheme",
    why=SUPPORTS_DEVICE.why,
    remove_when=_MODULAR,
)
SUPPORTS_ACTIVATION = EngineName(
    "vllm.model_executor.layers.fused_moe",
    "modular_kernel.FusedMoEExpertsModular._supports_activation",
    why=SUPPORTS_DEVICE.why,
    remove_when=_MODULAR,
)
SUPPORTS_PARALLEL_CONFIG = EngineName(
    "vllm.model_executor.layers.fused_moe",
    "modular_kernel.FusedMoEExpertsModular._supports_parallel_config",
    why=SUPPORTS_DEVICE.why,
    remove_when=_MODULAR,
)
MODULAR_KERNEL = EngineName(
    "vllm.model_executor.layers.fused_moe",
    "modular_kernel",
    why="be the experts' part of vLLM's modular kernel",
    remove_when=_MODULAR,
)
FUSED_MOE_KERNEL = EngineName(
    "vllm.model_executor.layers.fused_moe.modular_kernel",
    "FusedMoEKernel",
    why="have vLLM send tokens to the ranks of their experts and back",
    remove_when=_MODULAR,
)
PREPARE_FINALIZE = EngineName(
    "vllm.model_executor.layers.fused_moe.all2all_utils",
    "maybe_make_prepare_finalize",
    why="have vLLM send tokens to the ranks of their experts and back",
    remove_when=_MODULAR,
)
WEIGHTED_BY_VLLM = EngineName(
    "vllm.model_executor.layers.fused_moe.topk_weight_and_reduce",
    "TopKWeightAndReduceDelegate",
    why="leave weighting and the sum over a token's experts to vLLM",
    remove_when=_MODULAR,
)
WEIGHTED_BY_THE_CORE = EngineName(
    "vllm.model_executor.layers.fused_moe.topk_weight_and_reduce",
    "TopKWeightAndReduceNoOP",
    why="weight and sum a token's experts itself",
    remove_when=_MODULAR,
)
MOE_CONFIG = EngineName(
    "vllm.model_executor.layers.fused_moe.routed_experts",
    "RoutedExperts.moe_config",
    why="tell a layer of routed experts from the other layers",
    remove_when=_METHOD,
    since="0.24.0",
)
MOE_CONFIG_BEFORE = EngineName(
    "vllm.model_executor.layers.fused_moe.layer",
    "FusedMoE.moe_config",
    why=MOE_CONFIG.why,
    remove_when="no release below 0.24 is served",
    until="0.23.0",
)
EXPERT_MAP = EngineName(
    "vllm.model_executor.layers.fused_moe.routed_experts",
    "RoutedExperts._expert_map",
    # The property `expert_map` returns another table where AITER computes the experts.
    why="know which experts a rank keeps, and where",
    remove_when=_METHOD,
    since="0.24.0",
)
EXPERT_MAP_BEFORE = EngineName(
    "vllm.model_executor.layers.fused_moe.layer",
    "FusedMoE._expert_map",
    why=EXPERT_MAP.why,
    remove_when="no release below 0.24 is served",
    until="0.23.0",
)
ROUTING_TABLES = EngineName(
    "vllm.model_executor.layers.fused_moe.routed_experts",
    "RoutedExperts._expert_routing_tables",
    why="hand vLLM's modular kernel the tables by which DeepEP finds an expert's rank",
    remove_when=_MODULAR,
    since="0.24.0",
)
ROUTING_TABLES_BEFORE = EngineName(
    "vllm.model_executor.layers.fused_moe.layer",
    "FusedMoE._expert_routing_tables",
    why=ROUTING_TABLES.why,
    remove_when="no release below 0.24 is served",
    # With older releases the adapter does not use vLLM's modular kernel.
    since="0.22.0",
    until="0.23.0",
)
WORKSPACE_IS_MADE = EngineName(
    "vllm.v1.worker.workspace",
    "is_workspace_manager_initialized",
    # A worker on a CPU makes no workspace manager, and before 0.30 the kernel takes its buffers from one on a CPU too.
    why="see whether vLLM's modular kernel has its buffers on a CPU",
    remove_when="no release below 0.30 is served",
)
MAKE_WORKSPACE = EngineName(
    "vllm.v1.worker.workspace",
    "init_workspace_manager",
    why="give vLLM's modular kernel its buffers on a CPU",
    remove_when=WORKSPACE_IS_MADE.remove_when,
)

# --- loading and saving

GET_ALL_WEIGHTS = EngineName(
    "vllm.model_executor.model_loader.default_loader",
    "DefaultModelLoader.get_all_weights",
    # Only the loader knows that its tensors are a whole checkpoint, and which of them it leaves out.
    why="account for the tensors of a whole checkpoint",
    remove_when=_LOADER,
)
SAFETENSORS_ITERATOR = EngineName(
    "vllm.model_executor.model_loader.default_loader",
    "safetensors_weights_iterator",
    why="read the checkpoint's files with the core's threads",
    remove_when=_LOADER,
)
LOCAL_EXPERT_IDS = EngineName(
    "vllm.model_executor.model_loader.default_loader",
    "DefaultModelLoader.local_expert_ids",
    why="leave the experts of other ranks unread, as vLLM does",
    remove_when=_LOADER,
)
LEFT_OUT_PREFIXES = EngineName(
    "vllm.model_executor.model_loader.default_loader",
    "DefaultModelLoader._encoder_only_lm_prefixes",
    why="leave the language model unread under `--mm-encoder-only`, as vLLM does",
    remove_when=_LOADER,
    since="0.31.0",
)
SAVE_MODEL = EngineName(
    "vllm.model_executor.model_loader.sharded_state_loader",
    "ShardedStateLoader.save_model",
    why="save experts as the checkpoint packs them",
    remove_when="vLLM tells a quantization method when a running model is saved",
)
FS_TYPE = EngineName(
    "vllm.model_executor.model_loader.weight_utils",
    "_get_fs_type",
    why="leave files on a network to vLLM's own reading ahead",
    remove_when=_LOADER,
    since="0.20.0",
)
IS_NFS_PATH = EngineName(
    "vllm.model_executor.model_loader.weight_utils",
    "_is_nfs_path",
    why=FS_TYPE.why,
    remove_when="0.19 is not served",
    until="0.19.1",
)

# --- LoRA

SUPPORTED_LORA_MODULES = EngineName(
    "vllm.lora.model_manager",
    "get_supported_lora_modules",
    why="say which modules of the model may have adapters",
    remove_when="vLLM asks the model's class which modules take adapters",
)
MULTI_MODEL_KEYS = EngineName(
    "vllm.model_executor.models.module_mapping",
    "MultiModelKeys",
    why="tell the language model from the vision tower where adapters are loaded",
    remove_when="the in-tree class takes adapters",
)
WEIGHTS_MAPPER = EngineName(
    "vllm.model_executor.models.utils",
    "WeightsMapper",
    why="read the names that trainers give this model's modules",
    remove_when="the in-tree class takes adapters",
)
BGMV_SHRINK_OF_PREFILL = EngineName(
    "vllm.lora.ops.torch_ops.lora_ops",  # `sgmv_shrink` of this module calls the function
    "bgmv_shrink",
    why="keep adapters away from requests without one on a CPU",
    remove_when=_NO_ADAPTER_ON_CPU,
)
BGMV_SHRINK_OF_DECODING = EngineName(
    "vllm.lora.punica_wrapper.punica_cpu",
    "bgmv_shrink",
    why=BGMV_SHRINK_OF_PREFILL.why,
    remove_when=_NO_ADAPTER_ON_CPU,
)

# --- a CPU in a GPU's place

CPU_PREFILL = EngineName(
    "vllm.v1.attention.backends.mla.prefill.cpu_sdpa",
    "CPUSDPAMLAPrefillBackend",
    why="compute MLA's prefill on a CPU in less memory",
    remove_when=_PREFILL_ON_CPU,
    since="0.29.0",
)
RAGGED_SDPA = EngineName(
    "vllm.v1.attention.backends.mla.prefill.cpu_sdpa",
    "CPUSDPAMLAPrefillBackend._ragged_sdpa",
    why=CPU_PREFILL.why,
    remove_when=_PREFILL_ON_CPU,
    since="0.29.0",
)
CPU_PREFILL_PLACE = EngineName(
    "vllm.v1.attention.backends.mla.prefill.registry",
    "MLAPrefillBackendEnum.CPU",
    why=CPU_PREFILL.why,
    remove_when=_PREFILL_ON_CPU,
    since="0.29.0",
)
REGISTER_PREFILL = EngineName(
    "vllm.v1.attention.backends.mla.prefill.registry",
    "register_mla_prefill_backend",
    why=CPU_PREFILL.why,
    remove_when=_PREFILL_ON_CPU,
    since="0.23.0",
)
IS_AMX_BMM_ENABLED = EngineName(
    "vllm.model_executor.layers.attention.mla_attention",
    "MLAAttention.is_amx_bmm_enabled",
    why="keep a weight of MLA's that vLLM empties on a CPU with AMX, for a reload of the weights",
    remove_when="vLLM reloads a model's weights on a CPU with AMX by itself",
    since="0.29.0",
)
EXPAND_BATCH = EngineName(
    "vllm.v1.sample.rejection_sampler",
    "expand_batch_to_tokens",
    why="judge each guess of speculative decoding on a CPU by its request's own temperature, top_k and top_p",
    remove_when="vLLM's function for a CPU keeps the values' dtype (vLLM issue 55005)",
)

# --- kernels that `k26 tune` times beside the core's

CUSTOM_OPS = EngineName(
    "vllm",
    "_custom_ops",
    why="time vLLM's Marlin kernel",
    remove_when=_PEER,
)
FUSED_MARLIN_MOE = EngineName(
    "vllm.model_executor.layers.fused_moe.experts.marlin_moe",
    "fused_marlin_moe",
    why="time vLLM's Marlin kernel",
    remove_when=_PEER,
    since="0.21.0",
)
MARLIN_PERMUTE_SCALES = EngineName(
    "vllm.model_executor.layers.quantization.utils.marlin_utils",
    "marlin_moe_permute_scales",
    why="time vLLM's Marlin kernel",
    remove_when=_PEER,
)
SCALAR_TYPES = EngineName(
    "vllm.scalar_type",
    "scalar_types",
    why="time vLLM's Marlin kernel",
    remove_when=_PEER,
)
INT4_QUANT_CONFIG = EngineName(
    "vllm.model_executor.layers.fused_moe.config",
    "int4_w4a16_moe_quant_config",
    why="time vLLM's Triton kernel",
    remove_when=_PEER,
)
FUSED_EXPERTS = EngineName(
    "vllm.model_executor.layers.fused_moe.fused_moe",
    "fused_experts",
    why="time vLLM's Triton kernel",
    remove_when=_PEER,
)
MOE_ALIGN_BLOCK_SIZE = EngineName(
    "vllm.model_executor.layers.fused_moe.moe_align_block_size",
    "moe_align_block_size",
    why="time Humming's GEMMs as vLLM runs them",
    remove_when=_PEER,
)
MOE_FUSED_MUL_SUM = EngineName(
    "vllm.model_executor.layers.fused_moe.moe_fused_mul_sum",
    "moe_fused_mul_sum",
    why="time Humming's GEMMs as vLLM runs them",
    remove_when=_PEER,
    since="0.20.0",
)
PREPARE_MXINT4 = EngineName(
    "vllm.model_executor.layers.quantization.utils.flashinfer_mxint4_moe",
    "prepare_static_weights_for_trtllm_mxint4_moe",
    why="time FlashInfer's experts as vLLM runs them",
    remove_when=_PEER,
)
MXINT4 = EngineName(
    "vllm.model_executor.layers.quantization.utils.flashinfer_mxint4_moe",
    "flashinfer_trtllm_mxint4_moe",
    why=PREPARE_MXINT4.why,
    remove_when=_PEER,
)
