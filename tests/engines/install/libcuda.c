/* sgl_kernel links to the driver of CUDA, which a machine without a GPU lacks. Each function that it
   names fails here with CUDA_ERROR_NO_DEVICE. */
#define WITHOUT_DEVICE(name) int name(void) { return 100; }
WITHOUT_DEVICE(cuCtxFromGreenCtx)
WITHOUT_DEVICE(cuCtxPopCurrent_v2)
WITHOUT_DEVICE(cuCtxPushCurrent_v2)
WITHOUT_DEVICE(cuDevResourceGenerateDesc)
WITHOUT_DEVICE(cuDevSmResourceSplitByCount)
WITHOUT_DEVICE(cuDeviceGetDevResource)
WITHOUT_DEVICE(cuDriverGetVersion)
WITHOUT_DEVICE(cuGetErrorString)
WITHOUT_DEVICE(cuGetProcAddress_v2)
WITHOUT_DEVICE(cuGreenCtxCreate)
WITHOUT_DEVICE(cuGreenCtxDestroy)
WITHOUT_DEVICE(cuGreenCtxGetDevResource)
WITHOUT_DEVICE(cuPointerGetAttribute)
WITHOUT_DEVICE(cuStreamCreate)
