#define PPAP_ISA avx2
#define PPAP_LANES 8
#include "dense_crf_kernels.h"
