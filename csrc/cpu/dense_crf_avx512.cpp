#define PPAP_ISA avx512
#define PPAP_LANES 16
#include "dense_crf_kernels.h"
