#define PPAP_ISA avx512
#define PPAP_LANES 16
#define PPAP_ROWS 12
#include "kernels.h"
