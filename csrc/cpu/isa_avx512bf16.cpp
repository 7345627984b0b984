#define PPAP_ISA avx512bf16
#define PPAP_LANES 16
#define PPAP_ROWS 12
#define PPAP_PAIRS
#include "kernels.h"
