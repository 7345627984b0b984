#define PPAP_ISA avx2
#define PPAP_LANES 8
#define PPAP_ROWS 6
#include "kernels.h"
