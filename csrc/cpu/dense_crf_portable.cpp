#define PPAP_ISA portable
#define PPAP_LANES 4
#include "dense_crf_kernels.h"
