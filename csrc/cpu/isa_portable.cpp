#define PPAP_ISA portable
#define PPAP_LANES 4
#define PPAP_ROWS 4
#ifdef PPAP_EMULATE_PAIRS  // a test: the form with bf16 products, which few processors have
#define PPAP_PAIRS
#endif
#include "kernels.h"
