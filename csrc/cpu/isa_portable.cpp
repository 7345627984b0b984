#define PPAP_ISA portable
#define PPAP_LANES 4
#define PPAP_ROWS 4
#include "kernels.h"
